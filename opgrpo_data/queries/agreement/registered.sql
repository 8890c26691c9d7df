-- What a run trains comes after its registration; what it imported or chose to train on before that lies set apart.
SELECT
    format('runs/{}.json', run_id) AS path,
    format('it is gone: there are {} of its {}', count(*), string_agg(DISTINCT kind, ', ' ORDER BY kind)) AS problem,
    'restore it from a copy, or finish the import that the run came with' AS remedy
FROM settled
WHERE kind IN ('buffers', 'plans', 'densities', 'updates', 'evals') AND NOT regexp_matches(run_id, '(^|-)(imported|offline)$')
    AND format('runs/{}.json', run_id) NOT IN (SELECT path FROM files)
GROUP BY run_id
ORDER BY path;
