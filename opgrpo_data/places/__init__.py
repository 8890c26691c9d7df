"""Where files lie: local disks and object stores, behind one protocol (opgrpo_data.io.Directory)."""
