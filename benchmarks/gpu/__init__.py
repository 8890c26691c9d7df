"""What an iteration costs on a device: time, memory and FLOP of its stages, against bare diffusers and bare PyTorch."""
