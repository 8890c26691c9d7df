-- What a registered run drew comes from policies, prompts and parents that are there. Tars that were imported (in shards of
-- that name) bring none of them.
SELECT path, format('it names policy {}, which is not registered', policy_id) AS problem,
    'restore the folder of that policy from a copy' AS remedy
FROM (
    SELECT file, policy_id FROM trajectories SEMI JOIN drawn USING (file)
    UNION SELECT file, new_policy_id FROM updates
    UNION SELECT file, policy_id FROM evals
) named
JOIN settled USING (file)
SEMI JOIN runs USING (run_id)
ANTI JOIN policies USING (policy_id)
WHERE policy_id IS NOT NULL
UNION ALL
SELECT path, format('it holds trajectories of prompts that are not there ({}, for example of {})', count(*), min(prompt_id)),
    'restore the files of prompts/ from a copy'
FROM trajectories JOIN drawn USING (file) ANTI JOIN prompts USING (prompt_id)
GROUP BY path
UNION ALL
SELECT path, format('it continues trajectories that no index has ({}, for example {})', count(*), min(parent_id)),
    'restore the indexes they were in'
FROM trajectories t JOIN drawn USING (file) ANTI JOIN known k ON k.trajectory_id = t.parent_id
WHERE parent_id IS NOT NULL
GROUP BY path
ORDER BY ALL;
