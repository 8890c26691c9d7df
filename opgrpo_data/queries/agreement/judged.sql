-- Whatever is planned was judged: its rewards are there.
SELECT
    path,
    format('it holds trajectories without a reward that are planned ({}, for example {})', count(*), min(trajectory_id)) AS problem,
    'restore the files of rewards/ from a copy, or run `opgrpo score` again' AS remedy
FROM trajectories
JOIN files i USING (file)
JOIN runs r ON r.run_id = i.run_id AND r.draws
SEMI JOIN settled p ON p.kind = 'plans' AND p.run_id = i.run_id AND p.iteration = i.iteration
ANTI JOIN rewards USING (trajectory_id)
GROUP BY path
UNION ALL
SELECT
    path,
    format('it has rewards of trajectories that have none ({}, for example {})', count(DISTINCT trajectory_id), min(trajectory_id)),
    'restore the files of rewards/ from a copy, or run `opgrpo score` again'
FROM (SELECT file, trajectory_id, reward FROM buffers UNION ALL SELECT file, trajectory_id, reward FROM plans) used
JOIN settled USING (file)
SEMI JOIN trajectories USING (trajectory_id)
ANTI JOIN (SELECT trajectory_id FROM rewards WHERE value IS NOT NULL) valued USING (trajectory_id)
WHERE used.reward IS NOT NULL
GROUP BY path
ORDER BY path;
