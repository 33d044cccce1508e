"""What a run leaves behind: HDF5 records and their index, MP4, contact sheets, traces."""
