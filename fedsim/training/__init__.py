"""Training of one client: the task, the recipe, and the objective that strategies use."""
