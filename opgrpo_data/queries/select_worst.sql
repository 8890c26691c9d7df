-- Per prompt the entries of lowest reward; of equals the newer. Age plays no part: decay would make old entries worse, and keep them.
SELECT trajectory_id
FROM entries
QUALIFY row_number() OVER (
    PARTITION BY prompt_id ORDER BY reward, born_iteration DESC, member_index, trajectory_id
) <= getvariable('members')
ORDER BY prompt_id, reward, born_iteration DESC, member_index, trajectory_id
