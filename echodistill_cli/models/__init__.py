"""Models from hub ids, folders and single files into memory. To add a model family, see `config/families.py`."""
