-- Snapshots: what controller and API look at. They change nothing but the marks that belong to looking.

local SLOT_FIELDS = { 'shape', 'status', 'node', 'incarnation', 'devices', 'flag', 'requested', 'opened', 'idle', 'served',
  'token', 'kind', 'memory', 'share', 'cpu', 'host', 'exclusive', 'model', 'score' }

local function slots_of(p)
  local slots = {}
  for _, slot in ipairs(redis.call('SMEMBERS', p .. 'slots')) do
    local row = redis.call('HMGET', p .. 's:' .. slot, unpack(SLOT_FIELDS))
    for i = 1, #SLOT_FIELDS do row[i] = row[i] or '' end
    row[#row + 1] = redis.call('SCARD', p .. 'run:' .. slot)
    table.insert(row, 1, slot)
    slots[#slots + 1] = row
  end
  return slots
end

local function queues_of(p, looked, now)
  local queues = {}
  for _, shape in ipairs(redis.call('SMEMBERS', p .. 'active')) do
    local depth = redis.call('ZCARD', p .. 'q:' .. shape)
    local said = redis.call('HMGET', p .. 'sh:' .. shape, 'run_ms', 'unload', 'warm', 'warm_until', 'peak', 'vtime', 'oom')
    local warm = (tonumber(said[4] or '0') or 0) > now and tonumber(said[3]) or 0
    if looked and depth == 0 and warm == 0 and redis.call('SCARD', p .. 'ss:' .. shape) == 0 then
      redis.call('SREM', p .. 'active', shape)
      redis.call('HDEL', p .. 'sh:' .. shape, 'asked', 'wake_at', 'unload', 'warm', 'warm_until', 'vtime', 'oom')
    else
      if looked then redis.call('HDEL', p .. 'sh:' .. shape, 'asked') end
      local head = redis.call('ZRANGE', p .. 'q:' .. shape, 0, 0, 'WITHSCORES')
      local queued = head[1] and redis.call('HGET', p .. 't:' .. head[1], 'queued') or ''
      queues[#queues + 1] = { shape, redis.call('HGET', p .. 'shapes', shape) or '', depth, head[2] or '', queued,
        said[1] or '', warm, said[2] or '', learned_of(p, shape, now), said[5] or '',
        said[6] or '', said[7] or '' }
    end
  end
  return queues
end

local TENANT_FIELDS = { 'gpus', 'memory', 'running', 'active', 'gpus_max', 'memory_max', 'running_max', 'weight', 'vtime' }

-- Tenants with tasks that are not finished. One that has none any more is forgotten by the leader, and its past with it.
local function tenants_of(p, looked)
  local tenants = {}
  for _, tenant in ipairs(redis.call('SMEMBERS', p .. 'tenants')) do
    local key = p .. 'tn:' .. tenant
    local row = redis.call('HMGET', key, unpack(TENANT_FIELDS))
    if looked and tonumber(row[4] or '0') == 0 then
      redis.call('SREM', p .. 'tenants', tenant)
      redis.call('HDEL', key, 'vtime')
    else
      for i = 1, #TENANT_FIELDS do row[i] = row[i] or '' end
      table.insert(row, 1, tenant)
      tenants[#tenants + 1] = row
    end
  end
  return tenants
end

local NODE_FIELDS = { 'incarnation', 'beat', 'info', 'fenced', 'left', 'registered', 'cordon', 'cordon_by', 'cordoned',
  'deadline', 'remove' }

local function nodes_of(p)
  local nodes = {}
  for _, node in ipairs(redis.call('SMEMBERS', p .. 'nodes')) do
    local row = redis.call('HMGET', p .. 'n:' .. node, unpack(NODE_FIELDS))
    for i = 1, #NODE_FIELDS do row[i] = row[i] or '' end
    local heart = redis.call('HMGET', p .. 'hb:' .. node, 'uses', 'seen', 'address')
    for i = 1, 3 do row[#row + 1] = heart[i] or '' end
    table.insert(row, 1, node)
    nodes[#nodes + 1] = row
  end
  return nodes
end

-- look ("1": the controller, which takes note of what asked for it; "0": anybody): {now, queues, slots, nodes, refused nodes
-- with when and why, whether the leader reaches Dask and since when, tenants, mix of requests}.
local function state(keys, args)
  local p = keys[1]
  local now = now_ms()
  local dask = redis.call('HMGET', p .. 'leader', 'dask', 'dask_since')
  return { now, queues_of(p, args[1] == '1', now), slots_of(p), nodes_of(p), redis.call('HGETALL', p .. 'refused'),
    { dask[1] or '', dask[2] or '' }, tenants_of(p, args[1] == '1'), redis.call('GET', p .. 'mix') or '' }
end

local LIST_FIELDS = { 'state', 'function', 'attempt', 'shape', 'node', 'created', 'queued', 'started', 'finished',
  'failures', 'crashes', 'losses', 'error', 'array', 'index', 'progress', 'sequence' }
local SCAN_MAX = 2000 -- records looked at in one call; the caller goes on from the cursor

-- Newer servers write the score 100000000 as 1e+8.
local function sequence_text(score)
  return string.format('%.0f', tonumber(score))
end

-- tenant, before (sequence or ""), limit, state or "", function or "": {next sequence or "", rows}, newest first.
local function list(keys, args)
  local p, tenant, limit, wanted, name = keys[1], args[1], tonumber(args[3]), args[4], args[5]
  local index = p .. (LIVE[wanted] and 'ta:' or 'tt:') .. tenant
  local top = args[2] == '' and '+inf' or '(' .. args[2]
  local ids = redis.call('ZREVRANGEBYSCORE', index, top, '-inf', 'WITHSCORES', 'LIMIT', 0, SCAN_MAX)
  local rows = {}
  for i = 1, #ids, 2 do
    local row = redis.call('HMGET', p .. 't:' .. ids[i], unpack(LIST_FIELDS))
    if row[1] and (wanted == '' or row[1] == wanted) and (name == '' or row[2] == name) then
      for j = 1, #LIST_FIELDS do row[j] = row[j] or '' end
      table.insert(row, 1, ids[i])
      rows[#rows + 1] = row
      if #rows == limit then
        local more = i + 1 < #ids or #ids == SCAN_MAX * 2
        return { more and sequence_text(ids[i + 1]) or '', rows }
      end
    end
  end
  return { #ids == SCAN_MAX * 2 and sequence_text(ids[#ids]) or '', rows }
end

-- shape, score: how many tasks of the shape stand before.
local function position(keys, args)
  return redis.call('ZCOUNT', keys[1] .. 'q:' .. args[1], '-inf', '(' .. args[2])
end

-- token, ids …: of each task its state, its newest attempt, and the name of the file in which its result lies; '' for what
-- there is none of. {STALE} for who does not lead: what is not there may be removed by who asks, and a store that came back
-- empty has no leader.
local function kept(keys, args)
  local p, reply = keys[1], { 'OK' }
  if not leads(p, args[1]) then return { 'STALE' } end
  for i = 2, #args do
    local task = redis.call('HMGET', p .. 't:' .. args[i], 'state', 'attempt', 'file')
    reply[#reply + 1] = task[1] or ''
    reply[#reply + 1] = task[2] or ''
    reply[#reply + 1] = task[3] and cjson.decode(task[3]).name or ''
  end
  return reply
end

redis.register_function { function_name = 'ry_kept', callback = kept, flags = { 'no-writes' } }
redis.register_function { function_name = 'ry_state', callback = state, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_list', callback = list, flags = { 'no-writes' } }
redis.register_function { function_name = 'ry_position', callback = position, flags = { 'no-writes' } }
