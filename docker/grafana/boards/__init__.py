"""The dashboards, one module each; `kit` holds what they are made of."""
