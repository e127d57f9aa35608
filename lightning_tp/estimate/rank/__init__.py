"""One rank of a mesh that is not there: its parameters, its step (traced once and kept), its optimizer."""
