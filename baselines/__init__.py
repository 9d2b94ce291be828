"""The other methods, one small file each, through the protocol of fedbiot.py."""
import importlib

METHODS = ("fedbiot", "offsite", "fedot", "fedavg", "fedkseed", "fedkseed-pro", "fedtt",
           "fedtt+", "fedpt")
SHARED = {"fedot": "offsite", "fedkseed-pro": "fedkseed", "fedtt+": "fedtt"}  # they ask cfg.method


def module_of(method: str):
    """The module with the Server and the Client of a method."""
    name = SHARED.get(method, method)
    return importlib.import_module(name if name == "fedbiot" else f"baselines.{name}")
