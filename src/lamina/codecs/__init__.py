"""Codecs: thin faces of the libraries that pack and unpack bytes. Ground floor; a library is imported at its first use."""
