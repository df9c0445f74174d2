"""One client's learning: the task, the recipe, the objective that strategies see."""
