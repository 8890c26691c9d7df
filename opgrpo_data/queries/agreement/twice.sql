-- A trajectory has one row.
SELECT
    later AS path,
    CASE WHEN later = earlier THEN format('it has trajectories twice ({}, for example {})', count(*), min(trajectory_id))
        ELSE format('it has trajectories that {} has too ({}, for example {})', earlier, count(*), min(trajectory_id))
    END AS problem,
    CASE WHEN later = earlier THEN 'restore it from a copy'
        WHEN same THEN 'nothing is lost, their bytes are the same: readers take one of them'
        ELSE 'their bytes differ: restore the index that came later from a copy'
    END AS remedy
FROM (
    SELECT trajectory_id, min(path) AS earlier, max(path) AS later, count(DISTINCT checksums) = 1 AS same
    FROM trajectories JOIN files USING (file)
    GROUP BY trajectory_id
    HAVING count(*) > 1
)
GROUP BY earlier, later, same
ORDER BY ALL;
