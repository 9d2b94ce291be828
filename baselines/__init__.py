"""The other methods, one small file each, through the protocol of fedbiot.py."""
