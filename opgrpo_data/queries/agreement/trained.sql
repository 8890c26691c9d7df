-- An iteration that is trained has its trajectories, its buffer, its plan and its updates; an offline one draws nothing.
SELECT
    format('{}/run={}/iter={:06d}{}', kind, run_id, iteration, CASE kind WHEN 'trajectories' THEN '' ELSE '.parquet' END) AS path,
    format('it is gone: run {} is trained to iteration {}', run_id, last) AS problem,
    CASE WHEN kind IN ('plans', 'buffers') THEN 'restore it from a copy, or run `opgrpo select` for that iteration again' END AS remedy
FROM (SELECT *, unnest(range(last + 1)) AS iteration, ['updates', 'plans', 'buffers', 'trajectories'] AS kinds FROM reached)
CROSS JOIN unnest(kinds) AS needed(kind)
ANTI JOIN files USING (run_id, iteration, kind)
WHERE draws OR kind IN ('updates', 'plans')
ORDER BY path;
