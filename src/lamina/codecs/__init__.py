"""Codecs: thin wrappers of compression libraries. Base layer; a library is imported at its first use."""
