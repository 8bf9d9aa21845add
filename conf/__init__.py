"""Configuration: typed schema, validation and the Hydra groups (YAML) beside them."""
