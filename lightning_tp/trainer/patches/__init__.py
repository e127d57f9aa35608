"""Replace and read what Lightning, torchmetrics and torch keep private: the table of all patches, their checks, and named accessors."""
