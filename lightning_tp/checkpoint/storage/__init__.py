"""Read and write the files of a checkpoint on any file system: paths, names of files, torch's readers and writers, safe unpickling."""
