"""What a default run never touches. The core files import a module of this folder (`model.room`) at
the place where somebody asks for what it does."""
