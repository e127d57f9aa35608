"""What an estimate and a search found: values, with tables of text and JSON."""
