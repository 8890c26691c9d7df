-- Rewards lie beside the shard whose trajectories they judge, and judge each once.
SELECT path, 'the index of its shard is gone' AS problem, 'restore that index from a copy' AS remedy
FROM (SELECT DISTINCT file FROM rewards) judged JOIN settled USING (file) ANTI JOIN homes USING (file)
UNION ALL
SELECT
    path, format('it judges trajectories that its shard does not have ({}, for example {})', count(*), min(r.trajectory_id)), NULL
FROM rewards r
JOIN settled f USING (file)
JOIN homes h ON h.file = r.file AND h.readable
ANTI JOIN trajectories t ON t.file = h.home AND t.trajectory_id = r.trajectory_id
GROUP BY path
UNION ALL
SELECT
    later, format('it judges trajectories that have a value of {} {} already ({}, for example {})', reward, version, count(*),
        min(trajectory_id)), 'remove it if it has no others'
FROM (
    SELECT max(path) AS later, reward, version, trajectory_id
    FROM rewards JOIN files USING (file)
    WHERE error IS NULL
    GROUP BY trajectory_id, reward, version
    HAVING count(*) > 1
)
GROUP BY later, reward, version
ORDER BY ALL;
