"""The commands: `python -m eval NAME`, a file each."""
