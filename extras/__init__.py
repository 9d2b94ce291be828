"""What a default run never touches; the core files import a module of this folder where it is asked for."""
