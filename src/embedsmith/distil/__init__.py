"""Small students of a teacher: fewer layers, a narrower backbone, or a table of token vectors."""
