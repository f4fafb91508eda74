-- SPDX-License-Identifier: Apache-2.0
-- A little of everything, in one iteration: what a real script looks like to the interpreter.

local function fib(n)
  return n < 2 and n or fib(n - 1) + fib(n - 2)
end

local Account = {}
Account.__index = Account

function Account:deposit(amount)
  self.balance = self.balance + amount
  return self.balance
end

local function permutations(values)
  local function step(n)
    if n == 0 then
      coroutine.yield(values)
    end
    for i = 1, n do
      values[n], values[i] = values[i], values[n]
      step(n - 1)
      values[n], values[i] = values[i], values[n]
    end
  end
  return coroutine.wrap(function()
    step(#values)
  end)
end

return function()
  local result = { fib(25) }
  local account = setmetatable({ balance = 0 }, Account)
  for i = 1, 200000 do
    account:deposit(i & 15)
  end
  result[#result + 1] = account.balance

  local words = {}
  for i = 1, 12000 do
    words[i] = string.format("%04x", i * 40503 % 65536)
  end
  table.sort(words, function(a, b)
    return a < b
  end)
  result[#result + 1] = words[1] .. words[#words]

  local first = 0
  for order in permutations({ 1, 2, 3, 4, 5, 6, 7, 8 }) do
    first = first + order[1]
  end
  result[#result + 1] = first

  local text = table.concat(words, " ", 1, 12000)
  local vowels = 0
  for _ in text:gmatch("[ae]") do
    vowels = vowels + 1
  end
  result[#result + 1] = vowels
  return table.concat(result, ":")
end
