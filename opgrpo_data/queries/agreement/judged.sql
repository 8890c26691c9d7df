-- Whatever is planned was judged, and the value that buffers and plans repeat is there.
SELECT
    path,
    format('it holds trajectories without a reward that are planned ({}, for example {})', count(*), min(trajectory_id)) AS problem,
    'restore the files of rewards/ from a copy, or run `opgrpo score` again' AS remedy
FROM trajectories
JOIN drawn i USING (file)
JOIN runs r ON r.run_id = i.run_id AND r.draws
SEMI JOIN settled p ON p.kind = 'plans' AND p.run_id = i.run_id AND p.iteration = i.iteration
ANTI JOIN rewards USING (trajectory_id)
GROUP BY path
UNION ALL
SELECT
    path,
    format('it has rewards that no file of rewards/ has (of {} trajectories, for example {})',
        count(DISTINCT used.trajectory_id), min(used.trajectory_id)),
    'restore the files of rewards/ from a copy, or run `opgrpo score` again'
FROM (SELECT file, trajectory_id, reward FROM buffers UNION ALL SELECT file, trajectory_id, reward FROM plans) used
JOIN settled USING (file)
SEMI JOIN trajectories USING (trajectory_id)
ANTI JOIN rewards r ON r.trajectory_id = used.trajectory_id AND r.value = used.reward
WHERE used.reward IS NOT NULL
GROUP BY path
ORDER BY path;
