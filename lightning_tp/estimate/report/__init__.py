"""What an estimate, a search and a study of matmuls found: values, with tables of text and JSON."""
