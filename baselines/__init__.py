"""The other methods, one small file each, through the protocol of fedbiot.py."""
import importlib

MODULES = {"fedbiot": "fedbiot", "offsite": "baselines.offsite", "fedot": "baselines.offsite",
           "fedavg": "baselines.fedavg", "fedkseed": "baselines.fedkseed",
           "fedkseed-pro": "baselines.fedkseed", "fedtt": "baselines.fedtt",
           "fedtt+": "baselines.fedtt", "fedpt": "baselines.fedpt"}


def module_of(method: str):
    """The module with the Server and the Client of a method; those with two ask cfg.method."""
    return importlib.import_module(MODULES[method])
