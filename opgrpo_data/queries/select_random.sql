-- Per prompt a uniform draw from all its history: every trajectory has a key of its own, and the smallest keys stay.
-- Rewards and age play no part; nor does the run's name, which trajectory_id depends on.
SELECT trajectory_id
FROM (SELECT *, md5(concat_ws('/', getvariable('seed'), prompt_id, born_iteration, member_index)) AS key FROM entries)
QUALIFY row_number() OVER (PARTITION BY prompt_id ORDER BY key, trajectory_id) <= getvariable('members')
ORDER BY prompt_id, key, trajectory_id
