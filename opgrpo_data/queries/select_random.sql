-- Per prompt a uniform draw from all its history: every trajectory has a key of its own, and the smallest keys stay. Rewards and age play no part.
SELECT trajectory_id
FROM entries
QUALIFY row_number() OVER (
    PARTITION BY prompt_id ORDER BY md5(concat(getvariable('seed'), trajectory_id)), trajectory_id
) <= getvariable('members')
ORDER BY prompt_id, md5(concat(getvariable('seed'), trajectory_id)), trajectory_id
