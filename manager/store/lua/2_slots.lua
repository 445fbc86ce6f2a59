-- Slots, nodes and the leader. A slot id opens once; a node has one incarnation at a time; a leader's writes bear its token.

-- token, slot, shape, served_max: the leader asks for a slot.
local function request(keys, args)
  local p, token, slot, shape = keys[1], args[1], args[2], args[3]
  if not leads(p, token) then return 'STALE' end
  local key = p .. 's:' .. slot
  if redis.call('EXISTS', key) == 1 then return 'EXISTS' end
  redis.call('HSET', key, 'status', 'REQUESTED', 'shape', shape, 'token', token, 'requested', now_ms(),
    'served_max', args[4], 'served', 0, 'flag', '')
  redis.call('SADD', p .. 'slots', slot)
  redis.call('SADD', p .. 'ss:' .. shape, slot)
  redis.call('SADD', p .. 'active', shape)
  return 'OK'
end

-- Whether this incarnation is the node's newest, was not fenced, and has not left.
local function node_holds(p, node, incarnation)
  local record = redis.call('HMGET', p .. 'n:' .. node, 'incarnation', 'fenced', 'left')
  return record[1] == incarnation and record[2] ~= incarnation and record[3] ~= '1'
end

-- Whether nothing new may be opened on the node.
local function is_cordoned(p, node)
  return (redis.call('HGET', p .. 'n:' .. node, 'cordon') or '') ~= ''
end

local LEARNED_MS = 86400 * SECOND -- what a shape has learned of its memory holds for a day after it was last seen to be so

-- Bytes on each device that a slot of the shape is to lease by what others of it have used; 0: what was asked for will do.
local function learned_of(p, shape, now)
  local said = redis.call('HMGET', p .. 'sh:' .. shape, 'learned', 'learned_at')
  if not said[1] or now - tonumber(said[2]) > LEARNED_MS then return 0 end
  return tonumber(said[1])
end

-- What a slot has, as arguments say it: devices, memory on each, share of each and CPU in thousandths, memory of the host,
-- exclusive ("1" or ""), model. An older agent says less.
local function write_grant(key, args)
  redis.call('HSET', key, 'devices', args[4], 'memory', args[5] or '', 'share', args[6] or '', 'cpu', args[7] or '',
    'host', args[8] or '', 'exclusive', args[9] or '', 'model', args[10] or '')
end

-- slot, node, incarnation, grant (see write_grant): OK, ADOPTED (the same incarnation again), FENCED, or REFUSED. A slot
-- that comes to a node which was cordoned while it was on its way, or with less memory than its shape has learned since,
-- ends here, so that its shape is planned anew, under another id.
local function open(keys, args)
  local p, slot, node, incarnation = keys[1], args[1], args[2], args[3]
  if not node_holds(p, node, incarnation) then return { 'FENCED' } end
  local key = p .. 's:' .. slot
  local record = redis.call('HMGET', key, 'status', 'node', 'incarnation', 'shape')
  if not record[1] then return { 'REFUSED' } end
  local shape = record[4]
  local blob = redis.call('HGET', p .. 'shapes', shape)
  if record[1] == 'OPEN' and record[2] == node and record[3] == incarnation then return { 'ADOPTED', shape, blob } end
  if record[1] ~= 'REQUESTED' then return { 'REFUSED' } end
  if is_cordoned(p, node) then
    close_slot(p, slot, 'Cordoned', now_ms())
    return { 'REFUSED' }
  end
  local now = now_ms()
  if args[5] and tonumber(args[5]) < learned_of(p, shape, now) then
    close_slot(p, slot, 'TooSmall', now)
    return { 'REFUSED' }
  end
  redis.call('HSET', key, 'status', 'OPEN', 'node', node, 'incarnation', incarnation, 'opened', now, 'idle', '')
  write_grant(key, args)
  redis.call('SADD', p .. 'ns:' .. node, slot)
  return { 'OK', shape, blob }
end

-- slot, node, incarnation, grant (see write_grant): the agent has taken a Dask task of somebody's.
-- OK, ADOPTED, FENCED, REFUSED, or CORDONED.
local function open_direct(keys, args)
  local p, slot, node, incarnation = keys[1], args[1], args[2], args[3]
  if not node_holds(p, node, incarnation) then return 'FENCED' end
  local key = p .. 's:' .. slot
  local record = redis.call('HMGET', key, 'status', 'node', 'incarnation')
  if record[1] == 'OPEN' and record[2] == node and record[3] == incarnation then return 'ADOPTED' end
  if record[1] then return 'REFUSED' end
  if is_cordoned(p, node) then return 'CORDONED' end
  local now = now_ms()
  redis.call('HSET', key, 'status', 'OPEN', 'kind', 'direct', 'shape', '', 'node', node, 'incarnation', incarnation,
    'requested', now, 'opened', now, 'idle', '', 'served', 0, 'served_max', 0, 'flag', '')
  write_grant(key, args)
  redis.call('SADD', p .. 'slots', slot)
  redis.call('SADD', p .. 'ns:' .. node, slot)
  return 'OK'
end

-- slot, incarnation, reason: the agent ends the slot that it has opened.
local function close(keys, args)
  local p, slot = keys[1], args[1]
  local record = redis.call('HMGET', p .. 's:' .. slot, 'status', 'incarnation')
  if record[2] ~= args[2] then return 'FENCED' end
  close_slot(p, slot, args[3], now_ms())
  return 'OK'
end

-- incarnation, then (slot, peak, learned) …: the most bytes of a device that each slot was seen to use; and what slots of
-- its shape are to lease from now on, where that is more than was asked for, else 0. Slots of the shape that lease less
-- take nothing more: what failed in one of them may be tried again.
local function memory(keys, args)
  local p, now = keys[1], now_ms()
  for i = 2, #args, 3 do
    local record = redis.call('HMGET', p .. 's:' .. args[i], 'status', 'incarnation', 'shape', 'kind')
    if record[1] == 'OPEN' and record[2] == args[1] and record[4] ~= 'direct' then
      local shape, learned = record[3], tonumber(args[i + 2])
      local key = p .. 'sh:' .. shape
      local peak = tonumber(redis.call('HGET', key, 'peak') or '0')
      if tonumber(args[i + 1]) > peak then redis.call('HSET', key, 'peak', args[i + 1]) end
      local known = learned_of(p, shape, now)
      if learned > 0 then
        redis.call('HSET', key, 'learned', string.format('%.0f', math.max(known, learned)), 'learned_at', now)
      end
      if learned > known then
        for _, slot in ipairs(redis.call('SMEMBERS', p .. 'ss:' .. shape)) do
          local other = redis.call('HMGET', p .. 's:' .. slot, 'status', 'memory', 'flag', 'node')
          if other[1] == 'OPEN' and (tonumber(other[2] or '') or 0) < learned and (other[3] or '') == '' then
            redis.call('HSET', p .. 's:' .. slot, 'flag', 'drain')
            redis.call('SREM', p .. 'idle:' .. shape, slot)
            redis.call('PUBLISH', p .. 'wake:' .. other[4], 'flag ' .. slot)
          end
        end
        ask_for_plan(p, shape)
      end
    end
  end
  return 'OK'
end

-- token, reason, slots …: the leader ends slots, opened or not.
local function fence(keys, args)
  local p = keys[1]
  if not leads(p, args[1]) then return 'STALE' end
  local now = now_ms()
  for i = 3, #args do
    local node = redis.call('HGET', p .. 's:' .. args[i], 'node')
    if close_slot(p, args[i], args[2], now) and node then
      redis.call('PUBLISH', p .. 'wake:' .. node, 'flag ' .. args[i])
    end
  end
  return 'OK'
end

-- token, reason, slots …: the leader takes back slots that nobody has opened; returns those that have ended unopened, by
-- this call or, where its answer was lost, by its first send.
local function drop(keys, args)
  local p = keys[1]
  if not leads(p, args[1]) then return { 'STALE' } end
  local now, dropped = now_ms(), {}
  for i = 3, #args do
    local record = redis.call('HMGET', p .. 's:' .. args[i], 'status', 'opened')
    if record[1] == 'REQUESTED' then close_slot(p, args[i], args[2], now) end
    if record[1] and record[1] ~= 'OPEN' and not record[2] then dropped[#dropped + 1] = args[i] end
  end
  return { 'OK', dropped }
end

-- token, flag, slots …: close, drain or preempt; told in the reply to next, by the wake channel and in the beat.
local function flag(keys, args)
  local p = keys[1]
  if not leads(p, args[1]) then return 'STALE' end
  for i = 3, #args do
    local key = p .. 's:' .. args[i]
    local record = redis.call('HMGET', key, 'status', 'node', 'shape')
    if record[1] == 'OPEN' then
      redis.call('HSET', key, 'flag', args[2])
      redis.call('SREM', p .. 'idle:' .. record[3], args[i])
      redis.call('PUBLISH', p .. 'wake:' .. record[2], 'flag ' .. args[i])
    end
  end
  return 'OK'
end

local PAST_BYTES = 432 -- sixteen incarnations: more than can be under way

local function close_all_of(p, node, reason, now)
  local closed = {}
  for _, slot in ipairs(redis.call('SMEMBERS', p .. 'ns:' .. node)) do
    if close_slot(p, slot, reason, now) then closed[#closed + 1] = slot end
  end
  return closed
end

local function uncordon(key)
  redis.call('HDEL', key, 'cordon', 'cordon_by', 'cordoned', 'deadline', 'remove')
end

-- node, mode ("", cordon, drain), by (operator, autoscaler, agent), seconds until running tasks go back or "", remove
-- ("1" or ""), token (of an autoscaler), incarnation (of an agent) or "": OK, NONE (no such node; one that left
-- is there for operators only), STALE (the token or the incarnation), KEPT (nobody but an operator touches what
-- another has cordoned).
local function cordon(keys, args)
  local p, node, mode, by = keys[1], args[1], args[2], args[3]
  if by == 'autoscaler' and not leads(p, args[6], 'autoscaler') then return 'STALE' end
  if by == 'agent' and not node_holds(p, node, args[6]) then return 'STALE' end
  local key = p .. 'n:' .. node
  local record = redis.call('HMGET', key, 'incarnation', 'left', 'cordon', 'cordon_by')
  if not record[1] or (record[2] == '1' and by ~= 'operator') then return 'NONE' end
  local cordoned = (record[3] or '') ~= ''
  if by ~= 'operator' and cordoned and record[4] ~= by then return 'KEPT' end
  uncordon(key)
  if mode ~= '' then
    local now = now_ms()
    redis.call('HSET', key, 'cordon', mode, 'cordon_by', by, 'cordoned', now,
      'deadline', args[4] ~= '' and now + math.floor(tonumber(args[4]) * SECOND) or '', 'remove', args[5])
  end
  redis.call('PUBLISH', p .. 'wake:' .. node, 'node')
  redis.call('PUBLISH', p .. 'ctl', 'plan')
  return 'OK'
end

-- Why an inventory, (uuid, bytes) … from args[5] on, cannot be right; nil where nothing is wrong with it. A device that
-- another living node of the machine has would be in two ledgers, and its memory promised twice.
local function inventory_problem(p, node, args)
  local machine, seen = args[4], {}
  for i = 5, #args, 2 do
    local uuid = args[i]
    if uuid == '' then return 'a device has no uuid' end
    if seen[uuid] then return 'two devices are called ' .. uuid end
    if (tonumber(args[i + 1]) or 0) <= 0 then return uuid .. ' has ' .. args[i + 1] .. ' bytes of memory' end
    seen[uuid] = true
    local owner = redis.call('HGET', p .. 'dv:' .. machine, uuid)
    if owner and owner ~= node then
      local incarnation = redis.call('HGET', p .. 'n:' .. owner, 'incarnation')
      if incarnation and node_holds(p, owner, incarnation) then
        return uuid .. ' of this machine is held by node ' .. owner .. ', and two agents would promise its memory twice: '
          .. 'stop one of them, or give each devices of its own'
      end
    end
  end
end

-- The devices of a node are free for another one.
local function release_devices(p, node)
  local machine = redis.call('HGET', p .. 'n:' .. node, 'machine')
  if not machine then return end
  local owners = redis.call('HGETALL', p .. 'dv:' .. machine)
  for i = 1, #owners, 2 do
    if owners[i + 1] == node then redis.call('HDEL', p .. 'dv:' .. machine, owners[i]) end
  end
end

-- node, incarnation, info, machine, then (uuid, bytes) of each device: {OK}, {FENCED} or {REFUSED, why}. A new incarnation
-- ends all that earlier ones held. One that was replaced does not come back: a registration may be sent twice, and its
-- repeat arrive after the next agent's.
local function register(keys, args)
  local p, node, incarnation, machine = keys[1], args[1], args[2], args[4]
  local key = p .. 'n:' .. node
  local record = redis.call('HMGET', key, 'incarnation', 'fenced', 'past', 'cordon_by', 'left', 'remove', 'machine')
  local past = record[3] or ''
  if record[2] == incarnation then return { 'FENCED' } end
  if record[1] ~= incarnation and string.find(past, incarnation .. ' ', 1, true) then return { 'FENCED' } end
  local now = now_ms()
  local problem = inventory_problem(p, node, args)
  if record[1] and record[1] ~= incarnation and record[7] ~= machine and node_holds(p, node, record[1]) then
    -- Each would replace the other in turn, for ever. An agent that died there is declared lost within a lease.
    problem = 'a node of this name lives on another machine: choose another name (node.name), or stop that one; '
      .. 'if its machine has died, this one joins within a lease'
  end
  if problem then
    redis.call('HSET', p .. 'refused', node, now .. ' ' .. problem)
    return { 'REFUSED', problem }
  end
  if record[1] ~= incarnation then
    if record[1] then past = string.sub(record[1] .. ' ' .. past, 1, PAST_BYTES) end
    close_all_of(p, node, 'AgentRestarted', now)
    redis.call('HSET', key, 'past', past, 'registered', now)
    redis.call('HDEL', p .. 'hb:' .. node, 'address') -- until a Dask worker of this incarnation reports
    -- An operator's cordon is about the node. The others' were about this incarnation, and so was a removal that has taken
    -- place: the agent left, or was lost.
    local removed = record[6] == '1' and (record[5] == '1' or (record[1] and record[2] == record[1]))
    if record[4] ~= 'operator' or removed then uncordon(key) end
  end
  release_devices(p, node)
  for i = 5, #args, 2 do redis.call('HSET', p .. 'dv:' .. machine, args[i], node) end
  redis.call('HDEL', p .. 'refused', node)
  redis.call('HSET', key, 'incarnation', incarnation, 'info', args[3], 'machine', machine, 'left', '', 'gone', '')
  redis.call('HINCRBY', key, 'beat', 1)
  redis.call('SADD', p .. 'nodes', node)
  redis.call('PUBLISH', p .. 'ctl', 'plan')
  return { 'OK' }
end

-- node, incarnation, then (slot, i|b) …: {word, slot, word, slot …}; the first word is OK or FENCED.
-- Words about a slot: fenced, work, close, drain, preempt, cancel:ID. About the node (slot ""): cordoned, leave.
local function beat(keys, args)
  local p, node, incarnation = keys[1], args[1], args[2]
  if not node_holds(p, node, incarnation) then return { 'FENCED' } end
  redis.call('HINCRBY', p .. 'n:' .. node, 'beat', 1)
  local reply = { 'OK' }
  local function tell(slot, word) reply[#reply + 1] = slot; reply[#reply + 1] = word end
  local state = redis.call('HMGET', p .. 'n:' .. node, 'cordon', 'remove')
  if (state[1] or '') ~= '' then tell('', 'cordoned') end
  if state[2] == '1' and redis.call('SCARD', p .. 'ns:' .. node) == 0 then tell('', 'leave') end
  for i = 3, #args, 2 do
    local slot = args[i]
    local record = redis.call('HMGET', p .. 's:' .. slot, 'status', 'incarnation', 'flag', 'shape')
    if record[1] ~= 'OPEN' or record[2] ~= incarnation then
      tell(slot, 'fenced')
    else
      if record[3] and record[3] ~= '' then tell(slot, record[3]) end
      for _, id in ipairs(redis.call('SMEMBERS', p .. 'x:' .. slot)) do tell(slot, 'cancel:' .. id) end
      if args[i + 1] == 'i' then
        if redis.call('ZCARD', p .. 'q:' .. record[4]) > 0 or redis.call('SCARD', p .. 'run:' .. slot) > 0 then
          tell(slot, 'work')
        elseif not record[3] or record[3] == '' then
          redis.call('SADD', p .. 'idle:' .. record[4], slot) -- a wake-up that was lost had taken it out
        end
      end
    end
  end
  return reply
end

-- slot, ids …: cancellations that the agent has taken note of.
local function cancels(keys, args)
  return redis.call('SMEMBERS', keys[1] .. 'x:' .. args[1])
end

-- token, node, incarnation: the leader declares this incarnation dead. Returns the slots that it ended.
local function lost(keys, args)
  local p, node, incarnation = keys[1], args[2], args[3]
  if not leads(p, args[1]) then return { 'STALE' } end
  if redis.call('HGET', p .. 'n:' .. node, 'incarnation') ~= incarnation then return { 'GONE' } end
  local now = now_ms()
  redis.call('HSET', p .. 'n:' .. node, 'fenced', incarnation, 'gone', now)
  return { 'OK', close_all_of(p, node, 'NodeLost', now) }
end

-- node, incarnation: the agent stops cleanly.
local function leave(keys, args)
  local p, node = keys[1], args[1]
  if not node_holds(p, node, args[2]) then return 'FENCED' end
  local now = now_ms()
  close_all_of(p, node, 'AgentStopped', now)
  redis.call('HSET', p .. 'n:' .. node, 'left', '1', 'gone', now)
  return 'OK'
end

-- holder, token, beat, step, role: read | take (only from what was seen) | renew | resign. Returns {word, token, beat, holder}.
local function lead(keys, args)
  local p, holder, token, seen, step = keys[1], args[1], args[2], args[3], args[4]
  local key = p .. 'leader' .. (args[5] ~= '' and ':' .. args[5] or '')
  local record = redis.call('HMGET', key, 'token', 'beat', 'holder')
  local current = { token = record[1] or '0', beat = record[2] or '0', holder = record[3] or '' }
  local word = 'NO'
  if step == 'take' and current.holder == holder and tonumber(current.token) == tonumber(token) + 1 then
    word = 'OK' -- taken by the first send of this call
  elseif step == 'take' and current.token == token and (current.beat == seen or current.holder == '') then
    current = { token = tostring(tonumber(token) + 1), beat = '0', holder = holder }
    redis.call('HSET', key, 'token', current.token, 'beat', '0', 'holder', holder, 'held', '0')
    redis.call('HDEL', key, 'dask', 'dask_since')
    word = 'OK'
  elseif current.token == token and current.holder == holder then
    if step == 'renew' then
      current.beat = tostring(redis.call('HINCRBY', key, 'beat', 1))
      word = 'OK'
    elseif step == 'resign' then
      redis.call('HSET', key, 'holder', '')
      current.holder = ''
      word = 'OK'
    end
  end
  return { word, current.token, current.beat, current.holder }
end

-- token, held slots, then (shape, depth at which to ask again) …: what the leader has planned.
local function planned(keys, args)
  local p = keys[1]
  if not leads(p, args[1]) then return 'STALE' end
  redis.call('HSET', p .. 'leader', 'held', args[2])
  for i = 3, #args, 2 do redis.call('HSET', p .. 'sh:' .. args[i], 'wake_at', args[i + 1]) end
  return 'OK'
end

-- token, mix of requests as JSON: what the scheduler has learned of what comes.
local function mix(keys, args)
  local p = keys[1]
  if not leads(p, args[1]) then return 'STALE' end
  redis.call('SET', p .. 'mix', args[2])
  return 'OK'
end

-- token, tenants n, n × (tenant, running_max, gpus_max, memory_max, weight, vtime, retries_max), then (shape, vtime) …:
-- what each tenant may have at work (0: no limit), and what it and its shapes have had. A higher limit wakes who waited
-- for it.
local function shares(keys, args)
  local p = keys[1]
  if not leads(p, args[1]) then return 'STALE' end
  local first = 3 + 7 * tonumber(args[2])
  for i = 3, first - 1, 7 do
    redis.call('HSET', p .. 'tn:' .. args[i], 'running_max', args[i + 1], 'gpus_max', args[i + 2], 'memory_max', args[i + 3],
      'weight', args[i + 4], 'vtime', args[i + 5], 'retries_max', args[i + 6])
    give_turns(p, args[i])
  end
  for i = first, #args, 2 do
    if redis.call('SISMEMBER', p .. 'active', args[i]) == 1 then
      redis.call('HSET', p .. 'sh:' .. args[i], 'vtime', args[i + 1])
    end
  end
  return 'OK'
end

-- token, ok or down: whether the leader reaches the Dask scheduler.
local function reached(keys, args)
  local p = keys[1]
  if not leads(p, args[1]) then return 'STALE' end
  if redis.call('HGET', p .. 'leader', 'dask') ~= args[2] then
    redis.call('HSET', p .. 'leader', 'dask', args[2], 'dask_since', now_ms())
  end
  return 'OK'
end

-- shape, its canonical JSON, slots, seconds: so many slots are to be open for so long although nothing waits. 0: no more.
local function warm(keys, args)
  local p, shape = keys[1], args[1]
  redis.call('HSET', p .. 'shapes', shape, args[2])
  redis.call('HSET', p .. 'sh:' .. shape, 'warm', args[3], 'warm_until', now_ms() + math.floor(tonumber(args[4]) * SECOND))
  redis.call('SADD', p .. 'active', shape)
  redis.call('PUBLISH', p .. 'ctl', 'plan')
  return 'OK'
end

-- shapes …: their idle slots are to close, no more are kept warm, and what was learned of their memory is forgotten.
local function unload(keys, args)
  local p, now = keys[1], now_ms()
  for _, shape in ipairs(args) do
    redis.call('HDEL', p .. 'sh:' .. shape, 'learned', 'learned_at', 'peak')
    if redis.call('SISMEMBER', p .. 'active', shape) == 1 then
      redis.call('HDEL', p .. 'sh:' .. shape, 'warm', 'warm_until')
      redis.call('HSET', p .. 'sh:' .. shape, 'unload', now)
    end
  end
  redis.call('PUBLISH', p .. 'ctl', 'plan')
  return 'OK'
end

-- token, decision (JSON), how many are kept: the autoscaler's journal. Its id, or STALE.
local function journal(keys, args)
  local p = keys[1]
  if not leads(p, args[1], 'autoscaler') then return 'STALE' end
  return redis.call('XADD', p .. 'journal', 'MAXLEN', '~', args[3], '*', 'd', args[2])
end

-- Forgets nodes that left or were lost before a time, and hold nothing; and refusals of registrations from before it.
local function sweep_nodes(p, before)
  local refused = redis.call('HGETALL', p .. 'refused')
  for i = 1, #refused, 2 do
    if tonumber(string.match(refused[i + 1], '^%d+')) < before then redis.call('HDEL', p .. 'refused', refused[i]) end
  end
  for _, node in ipairs(redis.call('SMEMBERS', p .. 'nodes')) do
    local gone = tonumber(redis.call('HGET', p .. 'n:' .. node, 'gone') or '')
    if gone and gone < before and redis.call('SCARD', p .. 'ns:' .. node) == 0 then
      release_devices(p, node)
      redis.call('SREM', p .. 'nodes', node)
      redis.call('DEL', p .. 'n:' .. node, p .. 'hb:' .. node)
    end
  end
end

-- An array goes with the last of its tasks.
local function leave_array(p, tenant, array)
  local key = p .. 'a:' .. array
  if redis.call('HINCRBY', key, 'kept', -1) > 0 then return end
  local name = redis.call('HGET', key, 'name')
  if name then redis.call('HDEL', p .. 'nm:' .. tenant, name) end
  redis.call('ZREM', p .. 'ar:' .. tenant, array)
  redis.call('DEL', key)
end

-- Whether others have still to be told that this task has ended, or that its array has, of which it is the last.
local function is_to_be_told(p, id, array)
  if redis.call('EXISTS', p .. 'ch:' .. id) == 1 then return true end
  return array and redis.call('EXISTS', p .. 'ch:' .. array) == 1 and redis.call('HGET', p .. 'a:' .. array, 'kept') == '1'
end

-- Forgets finished tasks of a tenant that ended before a time, or are more than are kept, at most so many. One that others
-- have still to be told of stays. What files had their results goes into `files`.
local function sweep_tenant(p, tenant, before, kept, limit, files)
  local key = p .. 'dn:' .. tenant
  local old = redis.call('ZRANGEBYSCORE', key, '-inf', '(' .. before, 'LIMIT', 0, limit)
  local excess = redis.call('ZCARD', key) - tonumber(kept)
  if excess > #old then old = redis.call('ZRANGE', key, 0, math.min(excess, limit) - 1) end
  local swept = 0
  for _, id in ipairs(old) do
    local task = redis.call('HMGET', p .. 't:' .. id, 'state', 'name', 'array', 'file')
    if not is_to_be_told(p, id, task[3]) then
      redis.call('ZREM', key, id)
      if task[1] and not LIVE[task[1]] then
        swept = swept + 1
        redis.call('ZREM', p .. 'tt:' .. tenant, id)
        redis.call('DEL', p .. 't:' .. id, p .. 'l:' .. id)
        count_move(p, task[1], nil)
        if task[2] then redis.call('HDEL', p .. 'nm:' .. tenant, task[2]) end -- it may be given again
        if task[3] then leave_array(p, tenant, task[3]) end
        if task[4] then files[#files + 1] = cjson.decode(task[4]).name end
      end
    end
  end
  if redis.call('EXISTS', key) == 0 then redis.call('SREM', p .. 'dt', tenant) end
  return swept
end

-- token, slots closed and nodes gone before (ms), limit, tasks ended before (ms) and tasks kept of a tenant that is not named,
-- then (tenant, ended before, kept) …: forgets what is old, of each tenant and of slots at most so many.
-- Returns how many tasks and slots, and the names of the files in which results of these tasks lie.
local function sweep(keys, args)
  local p, limit = keys[1], tonumber(args[3])
  if not leads(p, args[1]) then return { 0, 0, {} } end
  local rules = {}
  for i = 6, #args, 3 do rules[args[i]] = { args[i + 1], args[i + 2] } end
  local swept, files = 0, {}
  for _, tenant in ipairs(redis.call('SMEMBERS', p .. 'dt')) do
    local rule = rules[tenant] or { args[4], args[5] }
    swept = swept + sweep_tenant(p, tenant, rule[1], rule[2], limit - swept, files)
    if swept >= limit then break end
  end
  forget_keys(p, now_ms() - KEPT_MS, limit)
  local tombs = redis.call('ZRANGEBYSCORE', p .. 'tombs', '-inf', '(' .. args[2], 'LIMIT', 0, limit)
  for _, slot in ipairs(tombs) do
    redis.call('ZREM', p .. 'tombs', slot)
    redis.call('DEL', p .. 's:' .. slot)
  end
  sweep_nodes(p, tonumber(args[2]))
  return { swept, #tombs, files }
end

redis.register_function { function_name = 'ry_request', callback = request, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_open', callback = open, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_open_direct', callback = open_direct, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_memory', callback = memory, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_cordon', callback = cordon, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_warm', callback = warm }
redis.register_function { function_name = 'ry_unload', callback = unload, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_journal', callback = journal, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_close', callback = close, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_fence', callback = fence, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_drop', callback = drop, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_flag', callback = flag, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_register', callback = register, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_beat', callback = beat, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_cancels', callback = cancels, flags = { 'no-writes' } }
redis.register_function { function_name = 'ry_lost', callback = lost, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_leave', callback = leave, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_lead', callback = lead, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_planned', callback = planned, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_mix', callback = mix, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_shares', callback = shares, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_reached', callback = reached, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_sweep', callback = sweep, flags = { 'allow-oom' } }
