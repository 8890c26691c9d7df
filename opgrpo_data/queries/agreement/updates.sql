-- An update trains what its plan says, and ends at a policy whose training state is there, where states are kept at all.
SELECT
    u.path, format('it trained trajectories that its plan does not have ({}, for example {})', count(*), min(t.trajectory_id)) AS problem,
    NULL AS remedy
FROM updates t
JOIN settled u USING (file)
JOIN files p ON p.kind = 'plans' AND p.run_id = u.run_id AND p.iteration = u.iteration AND p.readable
ANTI JOIN plans ON plans.file = p.file AND plans.trajectory_id = t.trajectory_id
WHERE t.trajectory_id IS NOT NULL
GROUP BY u.path
UNION ALL
SELECT
    format('states/run={}/iter={:06d}/{}.safetensors', run_id, iteration + 1, new_policy_id),
    'it is gone: the run cannot go on without its newest training state', 'restore it from a copy'
FROM (SELECT DISTINCT file, new_policy_id FROM updates WHERE new_policy_id IS NOT NULL)
JOIN settled u USING (file)
JOIN reached USING (run_id)
SEMI JOIN states kept ON kept.run_id = u.run_id
ANTI JOIN states s ON s.run_id = u.run_id AND s.iteration = u.iteration + 1 AND s.policy_id = new_policy_id
WHERE u.iteration = last
ORDER BY ALL;
