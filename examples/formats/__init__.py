"""Folders of other libraries, and the models in them."""
