"""From run folders to what people look at. Needs neither torch nor MPI."""
