-- Trajectories that are spoken of are there, and lie where it is said.
SELECT
    path,
    format('it names trajectories that no index has ({}, for example {})', count(DISTINCT trajectory_id), min(trajectory_id)) AS problem,
    'restore the indexes they were in from a copy, as files: an import writes them elsewhere' AS remedy
FROM named JOIN settled USING (file) ANTI JOIN known USING (trajectory_id)
GROUP BY path
UNION ALL
SELECT
    path,
    format('it says that latents lie where their index does not say so ({} trajectories, for example {})',
        count(DISTINCT used.trajectory_id), min(used.trajectory_id)),
    NULL
FROM (
    SELECT file AS user, trajectory_id, latents_file, latents_offset, latents_length, checksums FROM buffers
    UNION ALL SELECT file, trajectory_id, latents_file, latents_offset, latents_length, checksums FROM plans
) used
JOIN settled ON settled.file = used.user
SEMI JOIN trajectories USING (trajectory_id)
ANTI JOIN trajectories t USING (trajectory_id, latents_file, latents_offset, latents_length, checksums)
GROUP BY path
ORDER BY ALL;
