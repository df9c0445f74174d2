"""What all other packages build on: catalogues of names, atomic file writes, YAML, facts about the machine."""
