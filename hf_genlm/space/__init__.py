"""The browser demo, run locally or pushed as a Space."""
