"""Compute plane: the stages (rollout, score, select, train, eval), the sampler, the objective, the policies, the rewards."""
