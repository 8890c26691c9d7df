-- Per prompt the entries of highest decayed reward.
-- Of equals the newer stays: a reward of 0 does not decay, and a failure must not be kept for being the first.
SELECT trajectory_id
FROM entries
QUALIFY row_number() OVER (
    PARTITION BY prompt_id ORDER BY decayed_reward DESC, born_iteration DESC, member_index, trajectory_id
) <= getvariable('members')
ORDER BY prompt_id, decayed_reward DESC, born_iteration DESC, member_index, trajectory_id
