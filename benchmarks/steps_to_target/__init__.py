"""How many iterations, generated trajectories and seconds an arm needs to reach Flow-GRPO's final quality."""
