-- What the rules of this folder ask. Each rule returns path, problem, remedy: of a file, or of where one should be.
-- files: every file of the store (file, path; of a table also kind, run_id, iteration, name, and whether it could be read).
-- settled: those that were there when the others were listed. Only of these anything is demanded: while someone writes, the
-- listing has what they refer to.
-- runs: what is registered (run_id, draws). Tables of the store by their kinds, each row with the number of its file.
CREATE VIEW settled AS SELECT * FROM files WHERE settled;

-- Shards that registered runs drew.
CREATE VIEW drawn AS
SELECT * FROM settled SEMI JOIN runs USING (run_id) WHERE kind = 'trajectories' AND name NOT LIKE 'import-%';

CREATE VIEW policies AS
SELECT DISTINCT split_part(path, '/', 2) AS policy_id FROM files WHERE path LIKE 'policies/%/policy.json';

CREATE VIEW states AS
SELECT
    regexp_extract(path, '/run=([^/]+)/', 1) AS run_id,
    regexp_extract(path, '/iter=(\d+)/', 1)::BIGINT AS iteration,
    regexp_extract(path, '([^/]+)\.safetensors$', 1) AS policy_id
FROM files WHERE path LIKE 'states/run=%/iter=%/%.safetensors';

-- Trajectories that there are, or were: of one in quarantine an import leaves the row out.
CREATE VIEW known AS
SELECT trajectory_id FROM trajectories
UNION
SELECT regexp_extract(path, '([^/]+)\.parquet$', 1) FROM files WHERE path LIKE 'quarantine/%.parquet';

-- What a row names, and from where.
CREATE VIEW named AS
SELECT file, trajectory_id FROM buffers
UNION ALL SELECT file, trajectory_id FROM plans
UNION ALL SELECT file, trajectory_id FROM densities
UNION ALL SELECT file, trajectory_id FROM updates WHERE trajectory_id IS NOT NULL;

-- The last trained iteration of each run: what comes in an iteration needs the updates of the one before.
CREATE VIEW reached AS
SELECT run_id, draws, max(iteration - (kind <> 'updates')::INT) AS last
FROM settled JOIN runs USING (run_id)
WHERE kind IN ('buffers', 'plans', 'densities', 'updates', 'evals')
GROUP BY run_id, draws;

-- Which index the rewards of a file belong to: <shard>.v<version>.<number>.
CREATE VIEW homes AS
SELECT r.file, t.file AS home, t.readable
FROM (SELECT DISTINCT file, version FROM rewards) judged
JOIN files r USING (file)
JOIN files t ON t.kind = 'trajectories' AND t.run_id = r.run_id AND t.iteration = r.iteration
    AND starts_with(r.name, t.name || '.v' || judged.version || '.');
