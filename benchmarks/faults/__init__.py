"""What the trajectory store loses when processes are killed, bits flip, disks fill up and servers fail: nothing, one hopes."""
