"""A config as text: YAML and `key=value`, read by the types of a schema, and what is wrong with it in sentences."""
