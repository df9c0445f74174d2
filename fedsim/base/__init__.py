"""Below everything else: catalogues of names, files that are whole, YAML, the machine."""
