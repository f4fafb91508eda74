-- SPDX-License-Identifier: Apache-2.0
-- Tables as arrays, records and maps: a sieve, a matrix product and a histogram.

local function sieve(n)
  local composite, count = {}, 0
  for i = 2, n do
    if not composite[i] then
      count = count + 1
      for j = i * i, n, i do
        composite[j] = true
      end
    end
  end
  return count
end

local function matrix(n, seed)
  local rows = {}
  for i = 1, n do
    local row = {}
    for j = 1, n do
      row[j] = (i * seed + j) % 17
    end
    rows[i] = row
  end
  return rows
end

local function trace(a, b, n)
  local sum = 0
  for i = 1, n do
    local row = a[i]
    for j = 1, n do
      local cell = 0
      for k = 1, n do
        cell = cell + row[k] * b[k][j]
      end
      if i == j then
        sum = sum + cell
      end
    end
  end
  return sum
end

return function()
  local histogram = {}
  for i = 1, 60000 do
    local point = { x = i % 31, y = i % 17 }
    local key = point.x * 32 + point.y
    histogram[key] = (histogram[key] or 0) + 1
  end
  local n = 70
  return sieve(150000) .. ":" .. trace(matrix(n, 3), matrix(n, 5), n) .. ":" .. histogram[33]
end
