"""Tests of the documentation: the site builds, links lead somewhere, and all that pages show runs."""
