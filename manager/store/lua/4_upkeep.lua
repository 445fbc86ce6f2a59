-- What happens to the store as a whole: an upgrade of its data, and its return from a backup. Each call is bounded, may come
-- twice, and may be made by two processes at once; who makes it calls again until nothing is left.

-- limit: finished tasks of schema 1 go into the index of their tenant. Returns how many are left.
local function upgrade_ends(keys, args)
  local p = keys[1]
  local ended = redis.call('ZRANGE', p .. 'done', 0, tonumber(args[1]) - 1, 'WITHSCORES')
  for i = 1, #ended, 2 do
    local id, at = ended[i], ended[i + 1]
    local tenant = redis.call('HGET', p .. 't:' .. id, 'tenant')
    if tenant then
      redis.call('ZADD', p .. 'dn:' .. tenant, at, id)
      redis.call('SADD', p .. 'dt', tenant)
    end
    redis.call('ZREM', p .. 'done', id)
  end
  return redis.call('ZCARD', p .. 'done')
end

-- from, to, the oldest schema of a process that may go on: the data are of the next schema from now on.
local function upgraded(keys, args)
  local key = keys[1] .. 'meta'
  if redis.call('HGET', key, 'schema') ~= args[1] then return 0 end
  redis.call('HSET', key, 'schema', args[2], 'schema_min', args[3])
  return 1
end

local TERMS_AHEAD = 1000000 -- more than there can have been since the backup was made

-- How far a term is raised is remembered beside it, so that a repeat raises nothing.
local function pass_terms(p, backup)
  for _, key in ipairs({ p .. 'leader', p .. 'leader:autoscaler' }) do
    if redis.call('EXISTS', key) == 1 and redis.call('HGET', key, 'restored') ~= backup then
      redis.call('HINCRBY', key, 'token', TERMS_AHEAD)
      redis.call('HSET', key, 'holder', '', 'beat', '0', 'held', '0', 'restored', backup)
      redis.call('HDEL', key, 'dask', 'dask_since')
    end
  end
end

-- id of the restoration, limit: the data are a backup's, and nobody from before may write: all terms are over, every
-- incarnation is fenced, every slot closed, so that what ran goes back to its queue and blames nobody. Returns how many slots
-- are left.
local function restored(keys, args)
  local p, now = keys[1], now_ms()
  pass_terms(p, args[1])
  for _, node in ipairs(redis.call('SMEMBERS', p .. 'nodes')) do
    local key = p .. 'n:' .. node
    local incarnation = redis.call('HGET', key, 'incarnation')
    if incarnation and redis.call('HGET', key, 'fenced') ~= incarnation then
      redis.call('HSET', key, 'fenced', incarnation, 'gone', now)
    end
  end
  local done = 0
  for _, slot in ipairs(redis.call('SMEMBERS', p .. 'slots')) do
    if done == tonumber(args[2]) then break end
    redis.call('HSET', p .. 's:' .. slot, 'flag', 'preempt') -- what it ran counts as the cluster's own doing
    close_slot(p, slot, 'Restored', now)
    done = done + 1
  end
  return redis.call('SCARD', p .. 'slots')
end

redis.register_function { function_name = 'ry_upgrade_ends', callback = upgrade_ends, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_upgraded', callback = upgraded, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_restored', callback = restored, flags = { 'allow-oom' } }
