-- Submission, claims, ends, cancellation.

local KEPT_MS = 24 * 3600 * SECOND -- how long an idempotency key holds
local EXPANDED_MAX = 500            -- tasks of arrays that come into being in one call
local LATE_MAX = 500                -- tasks whose time was up that one claim passes by

-- The owner of the first of these ids that exists, as a task or an array; nil where none does.
local function owner_of_any(p, args, first)
  local names = {}
  for i = first, #args, 7 do
    names[#names + 1] = p .. 't:' .. args[i]
    if args[i + 6] ~= '' then names[#names + 1] = p .. 'a:' .. args[i] end
  end
  if redis.call('EXISTS', unpack(names)) == 0 then return nil end
  for _, name in ipairs(names) do
    local owner = redis.call('HGET', name, 'tenant')
    if owner then return owner end
  end
end

-- The status of a task or an array, for who asks for it again; '' where it is kept no more.
local function status_of(p, id)
  local state = redis.call('HGET', p .. 't:' .. id, 'state')
  if state then return state end
  if redis.call('EXISTS', p .. 'a:' .. id) == 0 then return '' end
  return end_of(p, id) or 'QUEUED'
end

local function replay(p, ids)
  local reply = { 'REPLAY' }
  for id in string.gmatch(ids, '[^,]+') do
    reply[#reply + 1] = id
    reply[#reply + 1] = status_of(p, id)
  end
  return reply
end

-- What this submission was answered before, by its idempotency key; nil where it is a new one.
local function known_by_key(p, tenant, key, digest, now)
  local said = key ~= '' and redis.call('HGET', p .. 'ik:' .. tenant, key)
  if not said then return nil end
  local created, body, ids = string.match(said, '^(%d+) (%S*) (.*)$')
  if now - tonumber(created) > KEPT_MS then return nil end
  if body ~= digest then return { 'CONFLICT', 'key' } end
  return replay(p, ids)
end

-- Forgets keys that hold no longer.
local function forget_keys(p, before, most)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', p .. 'iks', '-inf', '(' .. before, 'LIMIT', 0, most)) do
    local tenant, key = string.match(member, '^(%S+) (%S+)$')
    redis.call('ZREM', p .. 'iks', member)
    redis.call('HDEL', p .. 'ik:' .. tenant, key)
  end
end

-- From now on the key stands for these tasks.
local function keep_key(p, tenant, key, digest, ids, now)
  if key ~= '' then
    redis.call('HSET', p .. 'ik:' .. tenant, key, now .. ' ' .. digest .. ' ' .. ids)
    redis.call('ZADD', p .. 'iks', now, tenant .. ' ' .. key)
    forget_keys(p, now - KEPT_MS, 2) -- two go for each that comes: they never become more, whatever the pace
  end
end

-- What names say that are taken: all of them are, by the same requests, or the submission is refused; and
-- the ids where they are the same.
local function known_by_names(p, tenant, tasks)
  local ids, taken, here = {}, nil, {}
  for _, task in ipairs(tasks) do
    local name = task.more.name
    if name and here[name] then return { 'CONFLICT', 'name', name } end
    if name then here[name] = true end
    local said = name and redis.call('HGET', p .. 'nm:' .. tenant, name)
    if said then
      local id, digest = string.match(said, '^(%S+) (%S*)$')
      taken = taken or task.more.name
      if digest == task.more.digest then ids[#ids + 1] = id end
    end
  end
  if not taken then return nil end
  if #ids < #tasks then return { 'CONFLICT', 'name', taken } end
  local same = table.concat(ids, ',')
  return replay(p, same), same
end

-- The first id that one of them comes after and that is no task or array of the tenant, nor stands before it here.
local function unknown_parent(p, tenant, tasks)
  local here = {}
  for _, task in ipairs(tasks) do
    for _, parent in ipairs(task.more.after or {}) do
      if not here[parent] and redis.call('HGET', p .. 't:' .. parent, 'tenant') ~= tenant
        and redis.call('HGET', p .. 'a:' .. parent, 'tenant') ~= tenant then
        return parent
      end
      here[parent] = true
    end
    here[task.id] = true
  end
end

-- Has the task wait for those that it comes after and that have not ended. Returns the state that it begins with, and an
-- error where one of them has failed already.
local function wait_for(p, id, more)
  local waits = 0
  for _, parent in ipairs(more.after or {}) do
    local state = end_of(p, parent)
    if not state and redis.call('EXISTS', p .. 't:' .. parent, p .. 'a:' .. parent) == 0 then
      state = 'is not known any more' -- an array that was accepted before its parent was forgotten
    end
    if state and state ~= 'SUCCEEDED' and not more.run then return 'FAILED', parent_error(parent, state) end
    if not state and redis.call('SADD', p .. 'ch:' .. parent, id) == 1 then waits = waits + 1 end
  end
  if waits == 0 then return 'QUEUED' end
  redis.call('HSET', p .. 't:' .. id, 'waits', waits)
  return 'BLOCKED'
end

-- Writes the record of one task, and its place among those of its tenant.
local function write_task(p, tenant, id, shape, score, sequence, max_attempts, name, created, now, source, said)
  redis.call('HSET', p .. 't:' .. id, 'state', 'QUEUED', 'tenant', tenant, 'shape', shape, 'score', score,
    'sequence', sequence, 'max_attempts', max_attempts, 'function', name, source, said,
    'attempt', 0, 'created', created, 'queued', now)
  redis.call('ZADD', p .. 'tt:' .. tenant, sequence, id)
  redis.call('ZADD', p .. 'ta:' .. tenant, sequence, id)
end

-- Writes tasks that ask for nothing else, (id, shape, offset, max_attempts, function, spec, "") … from args[first] on: by far
-- the most, and so in few steps. Returns ids, states, and how many there are of each shape.
local function create_plain(p, tenant, args, first, sequence, now)
  local ids, states, arrived = {}, {}, {}
  for i = first, #args, 7 do
    local id, shape = args[i], args[i + 1]
    sequence = sequence + 1
    local score = string.format('%.0f', tonumber(args[i + 2]) + sequence)
    write_task(p, tenant, id, shape, score, sequence, args[i + 3], args[i + 4], now, now, 'spec', args[i + 5])
    redis.call('ZADD', p .. 'q:' .. shape, score, id)
    arrived[shape] = (arrived[shape] or 0) + 1
    ids[#ids + 1] = id
    states[#states + 1] = 'QUEUED'
  end
  redis.call('HINCRBY', p .. 'counts', 'QUEUED', #ids)
  return ids, states, arrived
end

-- Writes one task: its record, its place in the queue or behind others, and when its time is up.
local function create(p, tenant, task, sequence, now)
  local key, more = p .. 't:' .. task.id, task.more
  local score = string.format('%.0f', task.offset + sequence)
  write_task(p, tenant, task.id, task.shape, score, sequence, task.max_attempts, task.name, task.created or now, now,
    task.array and 'array' or 'spec', task.array or task.spec)
  if task.array then -- which has the spec of all its tasks, and the name
    redis.call('HSET', key, 'index', task.index)
  elseif more.name then
    redis.call('HSET', key, 'name', more.name)
  end
  if more.run then redis.call('HSET', key, 'run', '1') end
  local start_by, end_by = tonumber(more.start_by), tonumber(more.end_by)
  if start_by then redis.call('HSET', key, 'start_by', string.format('%.0f', start_by)) end
  if end_by then redis.call('HSET', key, 'end_by', string.format('%.0f', end_by)) end
  if start_by or end_by then
    redis.call('ZADD', p .. 'exp', string.format('%.0f', math.min(start_by or end_by, end_by or start_by)), task.id)
  end
  local state, err = wait_for(p, task.id, more)
  count_move(p, nil, 'QUEUED')
  if state == 'FAILED' then
    return finalise(p, task.id, load_task(p, task.id), 'FAILED', '', err, now)
  elseif state == 'BLOCKED' then
    redis.call('HSET', key, 'state', 'BLOCKED', 'queued', '')
    count_move(p, 'QUEUED', 'BLOCKED')
  else
    redis.call('ZADD', p .. 'q:' .. task.shape, score, task.id)
  end
  return state
end

local DIGITS = '0123456789abcdefghjkmnpqrstvwxyz'
local NO_INDEX = '0000'

-- The id of one task of an array, as manager/core/ids.py makes it.
local function id_in_array(array, index)
  local number, digits = index + 1, ''
  for _ = 1, 4 do
    digits = string.sub(DIGITS, number % 32 + 1, number % 32 + 1) .. digits
    number = math.floor(number / 32)
  end
  return string.sub(array, 1, -5) .. digits
end

local function array_of(id)
  return string.sub(id, 1, -5) .. NO_INDEX
end

-- What the tasks of an array ask for. Who has succeeded need not be known any more when the last of them gets its record.
local function asked_of_array(p, key, said)
  local more = cjson.decode(said)
  local after = {}
  for _, parent in ipairs(more.after or {}) do
    if end_of(p, parent) ~= 'SUCCEEDED' then after[#after + 1] = parent end
  end
  if #after < #(more.after or {}) then
    more.after = #after > 0 and after or nil
    redis.call('HSET', key, 'more', cjson.encode(more))
  end
  return more
end

-- Gives up to `most` more tasks of an array their records; returns how many. The array has all it needs, so anybody may.
local function expand_array(p, array, most, now)
  local key = p .. 'a:' .. array
  local said = redis.call('HMGET', key, 'tenant', 'shape', 'offset', 'max_attempts', 'function', 'more', 'sequence', 'count',
    'made', 'created')
  if not said[1] then
    redis.call('SREM', p .. 'ao', array)
    return 0
  end
  local count, made = tonumber(said[8]), tonumber(said[9])
  local last = math.min(count, made + most)
  local arrived, more = 0, asked_of_array(p, key, said[6])
  for index = made, last - 1 do
    local state = create(p, said[1], { id = id_in_array(array, index), shape = said[2], offset = tonumber(said[3]),
      max_attempts = said[4], name = said[5], more = more, array = array, index = index,
      created = said[10] }, tonumber(said[7]) + index, now)
    if state == 'QUEUED' then arrived = arrived + 1 end
  end
  redis.call('HSET', key, 'made', last)
  if last == count then redis.call('SREM', p .. 'ao', array) end
  if arrived > 0 then
    redis.call('SADD', p .. 'active', said[2])
    work_arrived(p, said[2], arrived)
  end
  return last - made
end

-- The same of whichever arrays have tasks to come.
local function expand_some(p, most, now)
  local made = 0
  while made < most do
    local array = redis.call('SRANDMEMBER', p .. 'ao')
    if not array then break end
    made = made + expand_array(p, array, most - made, now)
  end
  return made
end

-- Writes an array, of which the tasks are made by who expands it.
local function create_array(p, tenant, task, sequence, now)
  local more = task.more
  redis.call('HSET', p .. 'a:' .. task.id, 'tenant', tenant, 'shape', task.shape, 'offset', string.format('%.0f', task.offset),
    'max_attempts', task.max_attempts, 'function', task.name, 'spec', task.spec, 'more', cjson.encode(more),
    'sequence', sequence, 'count', more.count, 'made', 0, 'left', more.count, 'kept', more.count, 'created', now)
  if more.name then redis.call('HSET', p .. 'a:' .. task.id, 'name', more.name) end
  redis.call('ZADD', p .. 'ar:' .. tenant, sequence, task.id)
  redis.call('SADD', p .. 'ao', task.id)
end

-- What tasks ask for, of which one at least is not plain; and how many they will be.
local function tasks_of(args, first, now)
  local tasks, count = {}, 0
  for i = first, #args, 7 do
    local more = args[i + 6] == '' and {} or cjson.decode(args[i + 6])
    if more.start_ms then more.start_by = now + more.start_ms end
    if more.total_ms then more.end_by = now + more.total_ms end
    if more.deadline_ms then more.end_by = math.min(more.end_by or more.deadline_ms, more.deadline_ms) end
    tasks[#tasks + 1] = { id = args[i], shape = args[i + 1], offset = tonumber(args[i + 2]), max_attempts = args[i + 3],
      name = args[i + 4], spec = args[i + 5], more = more }
    count = count + (more.count or 1)
  end
  return tasks, count
end

-- Writes tasks and arrays. Returns ids, states, and how many of each shape may run.
local function create_all(p, tenant, tasks, sequence, now)
  local ids, states, arrived, room = {}, {}, {}, EXPANDED_MAX
  for i, task in ipairs(tasks) do
    local more = task.more
    sequence = sequence + 1
    ids[i] = task.id
    if more.name then redis.call('HSET', p .. 'nm:' .. tenant, more.name, task.id .. ' ' .. more.digest) end
    if more.count then
      create_array(p, tenant, task, sequence, now)
      sequence = sequence + more.count - 1
      if room > 0 then room = room - expand_array(p, task.id, room, now) end
      states[i] = status_of(p, task.id)
    else
      states[i] = create(p, tenant, task, sequence, now)
      if states[i] == 'QUEUED' then arrived[task.shape] = (arrived[task.shape] or 0) + 1 end
    end
  end
  return ids, states, arrived
end

-- tenant, idempotency key or "", digest of the body or "", then (name or "", digest) of each task that is asked for:
-- what ry_submit says of what was asked before, REPLAY or CONFLICT; {NONE} where it would be new. Nothing is written: a
-- name that is known does not keep the key.
local function known_before(keys, args)
  local p, tenant, tasks = keys[1], args[1], {}
  for i = 4, #args, 2 do
    tasks[#tasks + 1] = { more = args[i] ~= '' and { name = args[i], digest = args[i + 1] } or {} }
  end
  return known_by_key(p, tenant, args[2], args[3], now_ms()) or known_by_names(p, tenant, tasks) or { 'NONE' }
end

-- tenant, active_max, idempotency key or "", digest of the body or "", shapes m, m × (shape, json), then tasks:
-- (id, shape, score offset, max_attempts, function, spec, more) … `more` is "" or JSON: name and digest of what it asks
-- for; start_ms, total_ms (from now) and deadline_ms; after (ids), run (whether it does though one of those failed); count
-- (an array of so many, of which `id` is the id).
-- All or nothing: {OK, state …}, {REPLAY, id, state …} (asked before), {CONFLICT, key} or {CONFLICT, name, which} (asked
-- before, for something else), {PARENT, id}, {QUOTA, active}, {EXISTS}. Ids that exist, and are the tenant's, were accepted
-- by an earlier send of the same call; what exists is never written again. They are fresh and random: that one belongs to
-- another tenant is an error of the caller.
local function submit(keys, args)
  local p, tenant, active_max, key, digest = keys[1], args[1], tonumber(args[2]), args[3], args[4]
  local now = now_ms()
  local shapes, at = tonumber(args[5]), 6
  local first = at + shapes * 2
  local owner = owner_of_any(p, args, first)
  if owner then
    if owner ~= tenant then return { 'EXISTS' } end
    local reply = { 'OK' }
    for i = first, #args, 7 do reply[#reply + 1] = status_of(p, args[i]) end
    return reply
  end
  local known = known_by_key(p, tenant, key, digest, now)
  if known then return known end
  local tasks, count = nil, (#args - first + 1) / 7
  for i = first + 6, #args, 7 do
    if args[i] ~= '' then
      tasks, count = tasks_of(args, first, now)
      break
    end
  end
  if tasks then
    local same
    known, same = known_by_names(p, tenant, tasks)
    if same then keep_key(p, tenant, key, digest, same, now) end -- it may hold for longer than the name
    if known then return known end
    local parent = unknown_parent(p, tenant, tasks)
    if parent then return { 'PARENT', parent } end
  end
  local active = tonumber(redis.call('HGET', p .. 'tn:' .. tenant, 'active') or '0')
  if active + count > active_max then return { 'QUOTA', active } end
  for i = at, first - 1, 2 do
    redis.call('HSETNX', p .. 'shapes', args[i], args[i + 1])
    redis.call('SADD', p .. 'active', args[i])
  end
  redis.call('HINCRBY', p .. 'tn:' .. tenant, 'active', count) -- before an end can take one away
  if active == 0 then redis.call('SADD', p .. 'tenants', tenant) end -- else it is there, and stays
  local sequence = redis.call('HINCRBY', p .. 'meta', 'sequence', count) - count
  local ids, reply, arrived
  if tasks then
    ids, reply, arrived = create_all(p, tenant, tasks, sequence, now)
  else
    ids, reply, arrived = create_plain(p, tenant, args, first, sequence, now)
  end
  table.insert(reply, 1, 'OK')
  keep_key(p, tenant, key, digest, table.concat(ids, ','), now)
  for i = at, first - 1, 2 do work_arrived(p, args[i], arrived[args[i]] or 0) end
  if tasks then release(p, TOLD_MAX, now) end
  return reply
end

local MINUTE_MS = 60 * SECOND

local function retry_delay_ms(failures, chance)
  return math.floor(chance * math.min(300, 2 * 2 ^ failures) * SECOND)
end

local function crash_error(payload, crashes)
  local ok, err = pcall(cjson.decode, payload)
  if not ok or type(err) ~= 'table' then err = {} end
  local what = type(err.message) == 'string' and err.message or 'the executor died'
  err.type = 'ExecutorCrashed'
  err.message = what .. '; ' .. crashes .. ' crashes that this task alone can have caused'
  return cjson.encode(err)
end

-- How long a retry waits: its jitter, or until the tenant may retry again where it has retried too often in the last minute
-- (a leaky bucket, of which only the time is kept at which it will have run dry).
local function retry_pause_ms(p, tenant, failures, chance, now)
  local pause = retry_delay_ms(failures, chance)
  local key = p .. 'tn:' .. tenant
  local said = redis.call('HMGET', key, 'retries_max', 'retry_dry')
  local most = tonumber(said[1] or '0')
  if most == 0 then return pause end
  local dry = math.max(tonumber(said[2] or '0'), now) + MINUTE_MS / most
  redis.call('HSET', key, 'retry_dry', string.format('%.0f', dry))
  return math.max(pause, math.floor(dry - now - MINUTE_MS))
end

-- A retry that will never begin leaves its part of the tenant's minute to others.
local function spare_retry(p, tenant, now)
  local key = p .. 'tn:' .. tenant
  local said = redis.call('HMGET', key, 'retries_max', 'retry_dry')
  local most, dry = tonumber(said[1] or '0'), tonumber(said[2] or '0')
  if most == 0 or dry <= now then return end
  redis.call('HSET', key, 'retry_dry', string.format('%.0f', dry - MINUTE_MS / most))
end

local function words_of(payload)
  local ok, err = pcall(cjson.decode, payload)
  if not ok or type(err) ~= 'table' then return 'Failed', '' end
  return type(err.type) == 'string' and err.type or 'Failed', type(err.message) == 'string' and err.message or ''
end

local function note_failure(p, id, task, payload, now)
  local why, message = words_of(payload)
  note_try(p, id, task, why, message, now)
end

-- Out of device memory: once, the task moves to a shape with more room. `extra`: that shape, {id, json}.
local function with_more_room(p, id, task, payload, extra, now)
  local room = cjson.decode(extra)
  redis.call('HSETNX', p .. 'shapes', room[1], room[2])
  redis.call('SADD', p .. 'active', room[1])
  redis.call('HSET', p .. 'sh:' .. room[1], 'oom', '1')
  redis.call('HSET', p .. 't:' .. id, 'shape', room[1], 'oom', '1', 'error', payload)
  task.shape = room[1]
  enqueue(p, id, task, now)
  work_arrived(p, task.shape, 1)
  return 'QUEUED', true
end

-- It has started, which is all that its start_timeout asks for.
local function in_time(p, id, has_end)
  redis.call('HDEL', p .. 't:' .. id, 'start_by')
  if not has_end then redis.call('ZREM', p .. 'exp', id) end
end

-- Commits one end. Returns the task's state after it, or '' for a repeat and for an attempt that was replaced; and whether it
-- went into the queue of another shape. `extra`: of S the file in which the result lies, of O a shape with more room.
local function finish(p, slot, node, flag, id, attempt, outcome, payload, age_ms, chance, extra, now)
  local task = load_task(p, id)
  if not task or task.state ~= 'RUNNING' or task.slot ~= slot then
    redis.call('SREM', p .. 'run:' .. slot, id)
    return ''
  end
  -- The slot may have claimed the task anew since this end was first sent: that claim stays in its run set.
  if task.attempt ~= attempt then return '' end
  redis.call('SREM', p .. 'run:' .. slot, id)
  task.node = node
  if task.cancel ~= '' then redis.call('SREM', p .. 'x:' .. slot, id) end
  local key = p .. 't:' .. id
  if age_ms ~= '' then
    task.started = string.format('%.0f', now - tonumber(age_ms)) -- in the record with its state
    if task.start_by ~= '' then in_time(p, id, task.end_by ~= '') end
  end
  if outcome == 'S' then return finalise(p, id, task, 'SUCCEEDED', payload, '', now, extra) end
  if task.cancel ~= '' then return end_as_asked(p, id, task, now) end
  if outcome == 'O' and task.oom ~= '1' and extra ~= '' then
    note_failure(p, id, task, payload, now)
    return with_more_room(p, id, task, payload, extra, now)
  end
  if outcome == 'F' or outcome == 'N' or outcome == 'O' then
    local failures = redis.call('HINCRBY', key, 'failures', 1)
    if outcome == 'N' or failures >= tonumber(task.max_attempts) then
      return finalise(p, id, task, 'FAILED', '', payload, now)
    end
    note_failure(p, id, task, payload, now)
    redis.call('HSET', key, 'state', 'RETRY_WAIT', 'slot', '', 'started', task.started, 'error', payload)
    redis.call('HDEL', key, 'progress', 'message')
    redis.call('ZADD', p .. 'due', now + retry_pause_ms(p, task.tenant, failures, tonumber(chance), now), id)
    count_move(p, 'RUNNING', 'RETRY_WAIT')
    return 'RETRY_WAIT'
  end
  if outcome == 'X' then
    local crashes = redis.call('HINCRBY', key, 'crashes', 1)
    if crashes >= CRASHES_MAX then return finalise(p, id, task, 'FAILED', '', crash_error(payload, crashes), now) end
    note_failure(p, id, task, payload, now)
    redis.call('HSET', key, 'alone', '1', 'error', payload)
    return enqueue(p, id, task, now)
  end
  if outcome == 'A' then
    note_failure(p, id, task, payload, now)
    redis.call('HSET', key, 'alone', '1')
    return enqueue(p, id, task, now)
  end
  -- R: never started. L, and C that nobody asked for: a loss that blames nobody, and is not counted where the leader has
  -- pre-empted the slot.
  local why = outcome == 'R' and 'Returned' or flag == 'preempt' and 'Preempted' or 'Lost'
  return give_back(p, id, task, outcome ~= 'R' and flag ~= 'preempt', why, now)
end

local CLAIMED = 5 -- values of one claim in a reply
local CLAIM_FIELDS = { 'state', 'slot', 'attempt', 'alone', 'spec', 'index', 'checkpoint', 'oom', 'start_by', 'end_by' }

-- id, attempt, "1" where it must run alone, spec, and "" or JSON of what else its agent should know.
local function claim_reply(p, claims, id, attempt, said)
  claims[#claims + 1] = id
  claims[#claims + 1] = attempt
  claims[#claims + 1] = said[4] or ''
  claims[#claims + 1] = said[5] or redis.call('HGET', p .. 'a:' .. array_of(id), 'spec')
  local more = ''
  if said[6] or said[7] or said[8] then
    more = cjson.encode({ index = tonumber(said[6] or ''), checkpoint = said[7] or nil, more_memory = said[8] == '1' or nil })
  end
  claims[#claims + 1] = more
end

-- Whether the task's time was up before it could begin; it ends here then.
local function too_late(p, id, start_by, end_by, now)
  local late = (end_by and tonumber(end_by) <= now and 'end') or (start_by and tonumber(start_by) <= now and 'start')
  if not late then return false end
  local err = late == 'end' and deadline_error('the task was waiting') or start_error()
  finalise(p, id, load_task(p, id), 'FAILED', '', err, now)
  return true
end

-- Takes up to n tasks of the shape, in order, and says which score the first had. A task that must run alone comes alone.
local function claim(p, slot, node, shape, n, now)
  local claims, first, taken, looked, enough = {}, nil, 0, 0, false
  repeat
    local wanted = n - taken
    local popped = redis.call('ZPOPMIN', p .. 'q:' .. shape, wanted)
    for i = 1, #popped, 2 do
      local id = popped[i]
      local key = p .. 't:' .. id
      local task = redis.call('HMGET', key, unpack(CLAIM_FIELDS))
      local alone = task[4] == '1'
      enough = enough or (alone and taken > 0)
      if enough then
        redis.call('ZADD', p .. 'q:' .. shape, popped[i + 1], id)
      elseif task[1] == 'QUEUED' and not too_late(p, id, task[9], task[10], now) then
        enough = alone
        taken = taken + 1
        local attempt = tonumber(task[3]) + 1
        redis.call('HSET', key, 'state', 'RUNNING', 'attempt', attempt, 'slot', slot, 'node', node, 'claimed', now)
        redis.call('SADD', p .. 'run:' .. slot, id)
        first = first or string.format('%.0f', tonumber(popped[i + 1]))
        claim_reply(p, claims, id, attempt, task)
      end
    end
    looked = looked + #popped / 2
  until enough or taken == n or #popped < 2 * wanted or looked >= LATE_MAX
  if taken > 0 then
    redis.call('HINCRBY', p .. 'counts', 'QUEUED', -taken)
    redis.call('HINCRBY', p .. 'counts', 'RUNNING', taken)
  end
  return claims, first
end

-- Claims of this slot that the agent does not hold: the reply that carried them was lost.
local function redeliver(p, slot)
  local claims = {}
  for _, id in ipairs(redis.call('SMEMBERS', p .. 'run:' .. slot)) do
    local task = redis.call('HMGET', p .. 't:' .. id, unpack(CLAIM_FIELDS))
    if task[1] == 'RUNNING' and task[2] == slot then
      claim_reply(p, claims, id, tonumber(task[3]), task)
    else
      redis.call('SREM', p .. 'run:' .. slot, id)
    end
  end
  return claims
end

local function learn(p, shape, count, duration_ms)
  if count == 0 then return end
  local key = p .. 'sh:' .. shape
  local mean = duration_ms / count
  local old = redis.call('HGET', key, 'run_ms')
  -- The mean of a batch counts as one observation: shapes of short tasks must not forget faster than those of long ones.
  if old then mean = tonumber(old) * 0.8 + mean * 0.2 end
  redis.call('HSET', key, 'run_ms', string.format('%.3f', mean))
  redis.call('HINCRBY', key, 'ended', count)
end

-- The tenant of a slot, from its record or, the first time, from its shape; what it held before anybody counted is counted.
local function tenant_of(p, slot, shape, known, now)
  if known then return known end
  local tenant = cjson.decode(redis.call('HGET', p .. 'shapes', shape)).tenant
  redis.call('HSET', p .. 's:' .. slot, 'tenant', tenant)
  local held = redis.call('SCARD', p .. 'run:' .. slot)
  if held > 0 then
    redis.call('HINCRBY', p .. 'tn:' .. tenant, 'running', held)
    count_work(p, tenant, slot, size_of(p, slot, shape), now)
  end
  return tenant
end

-- How many tasks, of up to n, the slot may claim by its tenant's quota. `ended` of its tasks have ended in this call, `work`
-- is what is counted of it. 0: it waits until it is woken, and those that have waited for longer go first. A slot at work
-- goes on for as long as a turn takes, unless what waits elsewhere has the higher priority.
local function quota_allows(p, tenant, slot, shape, n, ended, work, now)
  local quota = quota_of(p, tenant)
  if not quota.bounded then return n end
  local size = size_of(p, slot, shape)
  quota.running = quota.running - ended
  if work.gpus then quota.gpus, quota.memory = quota.gpus - work.gpus, quota.memory - work.bytes end
  local head = redis.call('ZRANGE', p .. 'q:' .. shape, 0, 0, 'WITHSCORES')
  if not head[1] then return n end
  local rank = math.floor(tonumber(head[2]) / PRIORITY_STEP)
  local key = p .. 'qw:' .. tenant
  local ok = has_room(quota, size)
  if ok and not work.turn then
    local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    local before = first[1] and first[1] ~= slot and math.floor(tonumber(first[2]) / TURN_STEP) or NO_TURN
    local over = not work.gpus or now - work.since >= TURN_MS
    ok = before > rank or (before == rank and not over)
  end
  if ok then
    if quota.running_max == 0 then return n end
    return math.min(n, quota.running_max - quota.running)
  end
  -- Asked again, it keeps its place, unless what waits behind it is of a higher priority now.
  redis.call('ZADD', key, 'LT', string.format('%.0f', rank * TURN_STEP + now), slot)
  return 0
end

-- slot, incarnation, n, then ends: (id, attempt, outcome, payload, age_ms, duration_ms, chance, extra) …
-- Commits all ends, then replies {word, commits, claims}: FENCED | CLOSE | DRAIN | PREEMPT | IDLE | WORK.
-- With n = 0 it only commits. The agent calls it when it holds no claim of the slot but those that it reports.
local function next_(keys, args)
  local p, slot, incarnation, n = keys[1], args[1], args[2], tonumber(args[3])
  local key = p .. 's:' .. slot
  local record = redis.call('HMGET', key, 'status', 'incarnation', 'shape', 'node', 'flag', 'served', 'served_max',
    'tenant', 'gpus', 'bytes', 'since', 'turn', 'idle')
  if record[1] ~= 'OPEN' or record[2] ~= incarnation then return { 'FENCED', {}, {} } end
  local shape, node, flag = record[3], record[4], record[5]
  local now = now_ms()
  local tenant = tenant_of(p, slot, shape, record[8], now)
  if not record[8] then
    for i, counted in ipairs(redis.call('HMGET', key, 'gpus', 'bytes', 'since')) do record[8 + i] = counted end
  end
  local commits, ended, ran, ran_ms, requeued = {}, 0, 0, 0, 0
  for i = 4, #args, 8 do
    local status, elsewhere = finish(p, slot, node, flag, args[i], args[i + 1], args[i + 2], args[i + 3], args[i + 4],
      args[i + 6], args[i + 7], now)
    commits[#commits + 1] = status
    if status == 'QUEUED' and not elsewhere then requeued = requeued + 1 end
    if status ~= '' then ended = ended + 1 end
    -- A repeat is neither served nor learned from again.
    if status ~= '' and args[i + 5] ~= '' then ran = ran + 1; ran_ms = ran_ms + tonumber(args[i + 5]) end
  end
  if told_to_come then release(p, TOLD_MAX, now) end
  learn(p, shape, ran, ran_ms)
  local served = tonumber(record[6] or '0')
  if ran > 0 then served = redis.call('HINCRBY', key, 'served', ran) end
  -- The one way out: counts what the tenant has at work, and wakes who may go on instead.
  local function reply(word, claims, working)
    local taken = word == 'WORK' and working ~= 'again' and #claims / CLAIMED or 0
    if taken ~= ended then redis.call('HINCRBY', p .. 'tn:' .. tenant, 'running', taken - ended) end
    if working and not record[9] then count_work(p, tenant, slot, size_of(p, slot, shape), now) end
    if record[9] and not working then count_work(p, tenant, slot, nil, now) end
    if record[12] and n > 0 then redis.call('HDEL', key, 'turn') end
    if taken < ended or (n > 0 and not working) then give_turns(p, tenant) end
    local left = requeued - taken -- what came back and is not taken here is work for others
    if left > 0 then work_arrived(p, shape, left) end
    return { word, commits, claims }
  end
  if n == 0 then return reply('OK', {}, redis.call('SCARD', p .. 'run:' .. slot) > 0) end
  local lost = redeliver(p, slot)
  if #lost > 0 then return reply('WORK', lost, 'again') end
  local served_max = tonumber(record[7] or '0')
  local word = (flag and flag ~= '') and string.upper(flag) or (served_max > 0 and served >= served_max) and 'CLOSE'
  if word then
    redis.call('SREM', p .. 'idle:' .. shape, slot) -- it will take nothing: nobody may wake it instead of another
    redis.call('ZREM', p .. 'qw:' .. tenant, slot)
    return reply(word, {})
  end
  if served_max > 0 then n = math.min(n, served_max - served) end
  local work = { gpus = tonumber(record[9] or ''), bytes = tonumber(record[10] or ''), since = tonumber(record[11] or ''),
    turn = record[12] }
  local allowed = quota_allows(p, tenant, slot, shape, n, ended, work, now)
  local claims, first = {}, nil
  if allowed > 0 then claims, first = claim(p, slot, node, shape, allowed, now) end
  if #claims == 0 then
    -- One that the quota keeps waiting is woken by that: work that comes has nothing of it.
    redis.call(allowed > 0 and 'SADD' or 'SREM', p .. 'idle:' .. shape, slot)
    if allowed > 0 or (record[13] or '') == '' then redis.call('HSET', key, 'idle', now) end
    if tonumber(redis.call('HGET', p .. 'leader', 'held') or '0') > 0 then ask_for_plan(p, shape) end
    return reply('IDLE', {})
  end
  redis.call('SREM', p .. 'idle:' .. shape, slot)
  if (record[13] or '') ~= '' then redis.call('ZREM', p .. 'qw:' .. tenant, slot) end
  redis.call('HSET', key, 'idle', '', 'score', first)
  return reply('WORK', claims, true)
end

-- A task that runs for much longer than its shape's tasks are known to is news: the shape's run time is unknown again, and
-- what waits behind it may need slots of its own.
local function surprise(p, shape, age_ms)
  local run_ms = redis.call('HGET', p .. 'sh:' .. shape, 'run_ms')
  if not run_ms or age_ms < 4 * tonumber(run_ms) then return end
  redis.call('HDEL', p .. 'sh:' .. shape, 'run_ms')
  redis.call('HSET', p .. 'sh:' .. shape, 'wake_at', '1')
  if redis.call('ZCARD', p .. 'q:' .. shape) > 0 then ask_for_plan(p, shape) end
end

-- slot, incarnation, then (id, attempt, age_ms) …: the executor has taken these.
local function started(keys, args)
  local p, slot = keys[1], args[1]
  local now = now_ms()
  local count = 0
  local shape = redis.call('HGET', p .. 's:' .. slot, 'shape')
  for i = 3, #args, 3 do
    local key = p .. 't:' .. args[i]
    local task = redis.call('HMGET', key, 'state', 'slot', 'attempt', 'started', 'start_by', 'end_by')
    if task[1] == 'RUNNING' and task[2] == slot and task[3] == args[i + 1] then
      if not task[4] or task[4] == '' then -- a repeat comes later, with the same age
        redis.call('HSET', key, 'started', string.format('%.0f', now - tonumber(args[i + 2])))
        if task[5] then in_time(p, args[i], task[6]) end
      end
      if shape then surprise(p, shape, tonumber(args[i + 2])) end
      count = count + 1
    end
  end
  return count
end

-- id, attempt, stdout, stderr, bytes dropped of both, and of these of stderr (which an older agent does not say): what the
-- attempt has written so far. Kept only while the attempt is the newest, and only if it is not less than what is kept: a
-- repeat may come after its successor.
local function keep_log(keys, args)
  local p, id = keys[1], args[1]
  if redis.call('HGET', p .. 't:' .. id, 'attempt') ~= args[2] then return 0 end
  local key = p .. 'l:' .. id
  local kept = redis.call('HMGET', key, 'attempt', 'dropped')
  if kept[1] == args[2] then
    local bytes = redis.call('HSTRLEN', key, 'stdout') + redis.call('HSTRLEN', key, 'stderr') + tonumber(kept[2])
    if #args[3] + #args[4] + tonumber(args[5]) < bytes then return 0 end
  end
  redis.call('HSET', key, 'attempt', args[2], 'stdout', args[3], 'stderr', args[4], 'dropped', args[5],
    'err_dropped', args[6] or 0)
  return 1
end

-- slot, incarnation, then (id, attempt, progress, message, checkpoint) …: what running attempts have reported; "" is nothing
-- new of it (a message of " " is none any more). Returns how many are still the newest attempts, on this slot.
local function progress(keys, args)
  local p, slot, count = keys[1], args[1], 0
  local record = redis.call('HMGET', p .. 's:' .. slot, 'status', 'incarnation')
  if record[1] ~= 'OPEN' or record[2] ~= args[2] then return 0 end
  for i = 3, #args, 5 do
    local key = p .. 't:' .. args[i]
    local task = redis.call('HMGET', key, 'state', 'slot', 'attempt')
    if task[1] == 'RUNNING' and task[2] == slot and task[3] == args[i + 1] then
      count = count + 1
      if args[i + 2] ~= '' then redis.call('HSET', key, 'progress', args[i + 2]) end
      if args[i + 3] ~= '' then redis.call('HSET', key, 'message', args[i + 3]) end
      if args[i + 4] ~= '' then redis.call('HSET', key, 'checkpoint', args[i + 4]) end
    end
  end
  return count
end

-- Ends a task for whoever may: CANCELLED at once where nothing runs; else its agent is told. Returns the state after.
local function end_early(p, id, task, mark, now)
  if task.state == 'RUNNING' then
    redis.call('HSET', p .. 't:' .. id, 'cancel', mark)
    redis.call('SADD', p .. 'x:' .. task.slot, id)
    redis.call('PUBLISH', p .. 'wake:' .. task.node, 'cancel ' .. task.slot)
    return 'RUNNING'
  end
  redis.call('ZREM', p .. 'q:' .. task.shape, id)
  if redis.call('ZREM', p .. 'due', id) == 1 then spare_retry(p, task.tenant, now) end
  if mark == '1' then return finalise(p, id, task, 'CANCELLED', '', '', now) end
  return finalise(p, id, task, 'FAILED', '', mark, now)
end

-- id, tenant: CANCELLED at once where nothing runs; else its agent is told. Returns the state after, or nil.
local function cancel(keys, args)
  local p, id, tenant = keys[1], args[1], args[2]
  local task = load_task(p, id)
  if not task or (tenant ~= '' and task.tenant ~= tenant) then return nil end
  if not LIVE[task.state] then return task.state end
  local now = now_ms()
  local state = end_early(p, id, task, '1', now)
  release(p, TOLD_MAX, now)
  return state
end

-- array, tenant, from, most: cancels up to `most` of its tasks from that index on. {next index or -1, cancelled now,
-- running ones told}; nil where there is no such array. What has no record yet gets one first: each task has an end of its own.
local function cancel_array(keys, args)
  local p, array, from, most = keys[1], args[1], tonumber(args[3]), tonumber(args[4])
  local said = redis.call('HMGET', p .. 'a:' .. array, 'tenant', 'count', 'made')
  if not said[1] or (args[2] ~= '' and said[1] ~= args[2]) then return nil end
  local now, ended, told, made = now_ms(), 0, 0, tonumber(said[3])
  local last = math.min(tonumber(said[2]), from + most)
  if made < last then last = math.min(last, made + expand_array(p, array, math.min(last - made, most), now)) end
  last = math.max(last, from)
  for index = from, last - 1 do
    local id = id_in_array(array, index)
    local task = load_task(p, id)
    if task and LIVE[task.state] then
      if end_early(p, id, task, '1', now) == 'RUNNING' then told = told + 1 else ended = ended + 1 end
    end
  end
  release(p, TOLD_MAX, now)
  return { last < tonumber(said[2]) and last or -1, ended, told }
end

-- Ends tasks whose time is up, at most so many. One that runs is ended by its agent, and fails by that.
local function expire(p, most, now)
  local ids = redis.call('ZRANGEBYSCORE', p .. 'exp', '-inf', now, 'LIMIT', 0, most)
  for _, id in ipairs(ids) do
    redis.call('ZREM', p .. 'exp', id)
    local task = load_task(p, id)
    if task and LIVE[task.state] then
      local end_by, start_by = tonumber(task.end_by), tonumber(task.start_by)
      if end_by and end_by <= now then
        if task.state == 'RUNNING' then
          if task.cancel == '' then end_early(p, id, task, DEADLINE, now) end
        else
          end_early(p, id, task, deadline_error('the task was waiting'), now)
        end
      elseif start_by and start_by <= now and task.state ~= 'RUNNING' then
        end_early(p, id, task, start_error(), now)
      elseif start_by and start_by <= now then -- claimed, and not yet known to have started
        redis.call('ZADD', p .. 'exp', string.format('%.0f', math.min(now + SECOND, end_by or math.huge)), id)
      elseif end_by then
        redis.call('ZADD', p .. 'exp', string.format('%.0f', end_by), id)
      end
    end
  end
  return #ids
end

-- Retries that are due go back to their queues, at most so many.
local function retry(p, most, now)
  local ids = redis.call('ZRANGEBYSCORE', p .. 'due', '-inf', now, 'LIMIT', 0, most)
  for _, id in ipairs(ids) do
    redis.call('ZREM', p .. 'due', id)
    local task = load_task(p, id)
    if task and task.state == 'RETRY_WAIT' then
      enqueue(p, id, task, now)
      work_arrived(p, task.shape, 1)
    end
  end
  return #ids
end

-- limit: what time brings: retries that are due, tasks whose time is up, those that wait for what has ended, and the rest of
-- arrays; each at most so many. Returns how many of each, and ms until the next (0: there is more now; -1: nothing waits).
local function due(keys, args)
  local p, now, most = keys[1], now_ms(), tonumber(args[1])
  local retried, expired = retry(p, most, now), expire(p, most, now)
  local told = release(p, most, now)
  local made = expand_some(p, most, now)
  if redis.call('SCARD', p .. 'ao') + redis.call('SCARD', p .. 'rel') > 0 then return { retried, expired, told, made, 0 } end
  local following = math.huge
  for _, name in ipairs({ 'due', 'exp' }) do
    local head = redis.call('ZRANGE', p .. name, 0, 0, 'WITHSCORES')
    if head[1] then following = math.min(following, tonumber(head[2])) end
  end
  return { retried, expired, told, made, following == math.huge and -1 or math.max(0, math.floor(following - now)) }
end

-- limit: the rest of arrays, at most so many tasks; returns how many arrays have more to come.
local function expand(keys, args)
  expand_some(keys[1], tonumber(args[1]), now_ms())
  return redis.call('SCARD', keys[1] .. 'ao')
end

local REFUSE_SCAN_MAX = 5000 -- tasks of a queue that are looked at in one call; those that asked for so much themselves stay

-- token, shape, limit: no node that is known, or could be added, can ever hold that shape: its tasks that are there since a
-- smaller one ran out of memory fail with what they said then. Returns how many.
local function refuse(keys, args)
  local p, shape, failed = keys[1], args[2], 0
  if not leads(p, args[1]) then return -1 end
  local now, most = now_ms(), tonumber(args[3])
  for _, id in ipairs(redis.call('ZRANGE', p .. 'q:' .. shape, 0, REFUSE_SCAN_MAX - 1)) do
    if failed == most then break end
    local task = redis.call('HGET', p .. 't:' .. id, 'oom') == '1' and load_task(p, id)
    if task and task.state == 'QUEUED' then
      redis.call('ZREM', p .. 'q:' .. shape, id)
      redis.call('HINCRBY', p .. 't:' .. id, 'failures', 1)
      finalise(p, id, task, 'FAILED', '', redis.call('HGET', p .. 't:' .. id, 'error') or '', now)
      failed = failed + 1
    end
  end
  if failed < most and redis.call('ZCARD', p .. 'q:' .. shape) < REFUSE_SCAN_MAX then
    redis.call('HDEL', p .. 'sh:' .. shape, 'oom') -- one that comes back into the queue sets it again
  end
  release(p, TOLD_MAX, now)
  return failed
end

local AGE_MISSES_MAX = 8 -- tasks of one priority that are too young before the rest is taken to be so: they stand by age

-- The highest priority that waits in one of these shapes by itself, not by its age; as a rank, lower is higher.
local function highest_rank(p, args, first)
  local highest = NO_TURN
  for i = first, #args do
    local head = redis.call('ZRANGE', p .. 'q:' .. args[i], 0, 0, 'WITHSCORES')
    if head[1] and not redis.call('HGET', p .. 't:' .. head[1], 'rose') then
      highest = math.min(highest, math.floor(tonumber(head[2]) / PRIORITY_STEP))
    end
  end
  return highest
end

-- token, ms, limit, shapes …: each task that has waited for so long since it came, or since it rose last, rises by one
-- priority, among the others of that by its sequence; but not over the highest that waits in any of the shapes: where all
-- are alike, age is no reason to take more than one's share. At most so many; returns how many have risen.
local function age(keys, args)
  local p, ms, limit = keys[1], tonumber(args[2]), tonumber(args[3])
  if not leads(p, args[1]) then return -1 end
  local now, risen = now_ms(), 0
  local lower = string.format('%.0f', (highest_rank(p, args, 4) + 1) * PRIORITY_STEP)
  for i = 4, #args do
    local queue, from = p .. 'q:' .. args[i], lower
    while risen < limit do
      local first = redis.call('ZRANGEBYSCORE', queue, from, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
      if not first[1] then break end
      local rank = math.floor(tonumber(first[2]) / PRIORITY_STEP)
      from = string.format('%.0f', (rank + 1) * PRIORITY_STEP)
      local misses = 0
      for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, first[2], '(' .. from, 'LIMIT', 0, limit - risen)) do
        local task = redis.call('HMGET', p .. 't:' .. id, 'queued', 'rose', 'score')
        if now - math.max(tonumber(task[1]), tonumber(task[2] or '0')) >= ms then
          local score = string.format('%.0f', tonumber(task[3]) - PRIORITY_STEP)
          redis.call('HSET', p .. 't:' .. id, 'score', score, 'rose', now)
          redis.call('ZADD', queue, score, id)
          risen = risen + 1
        else
          misses = misses + 1
          if misses == AGE_MISSES_MAX then break end
        end
      end
    end
  end
  return risen
end

redis.register_function('ry_submit', submit) -- no allow-oom: a full store must refuse new work
redis.register_function { function_name = 'ry_known', callback = known_before, flags = { 'no-writes' } }
redis.register_function { function_name = 'ry_next', callback = next_, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_started', callback = started, flags = { 'allow-oom' } }
redis.register_function('ry_log', keep_log)
redis.register_function { function_name = 'ry_cancel', callback = cancel, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_progress', callback = progress, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_cancel_array', callback = cancel_array, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_expand', callback = expand, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_refuse', callback = refuse, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_due', callback = due, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_age', callback = age, flags = { 'allow-oom' } }
