"""From a recipe to a trained, measured model: the loop is Trainer's, the decisions are here."""
