"""The modelling code that travels with every exported checkpoint; the search and the reports run the same files."""
