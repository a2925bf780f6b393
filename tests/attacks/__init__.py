"""Hostile images: every known attack on image parsers as a named regression, the limits, and a mutation fuzzer.

`oracle` says what must hold for any bytes whatever, `images` makes the victims.
"""
